"""Named cases of merging."""

import dataclasses
import itertools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels import dense
from kernels.case import Case, Cost, to_numpy
from kernels.dispatch import Implementation
from kernels.equivalent import UnsuitableError
from kernels.gpu import Gpu
from kernels.merge.api import merge_lse
from kernels.merge.heuristic import choose_tiles
from kernels.tile_io import power_of_two
from kernels.tiles import MergeTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeCase(Case):
    """`parts` parts of attention, for `length` queries of each head."""

    kv_heads: int = 1  # merging has none
    parts: int
    length: int = 1
    empty_parts: int = 0  # the first ones saw no key
    empty_rows: int = 0  # the first rows, which saw no key in any part

    def shapes(self) -> tuple[Any, ...]:
        rows = (self.parts, self.length, self.q_heads)
        return self.array(*rows, self.head_dim), jax.ShapeDtypeStruct(rows, jnp.float32)

    def integers(self) -> list[np.ndarray]:
        return []

    def run(
        self,
        outs: Float[Array, "parts length q_heads head_dim"],
        lses: Float[Array, "parts length q_heads"],
        *,
        implementation: Implementation,
        tiles: MergeTiles | None = None,
    ) -> tuple[Float[Array, "length q_heads head_dim"], Float[Array, "length q_heads"]]:
        return merge_lse(outs, self.seen(lses), implementation=implementation, tiles=tiles)

    def seen(
        self, lses: Float[Array, "parts length q_heads"]
    ) -> Float[Array, "parts length q_heads"]:
        """Return lses with -inf for the case's empty parts and rows."""
        lses = lses.at[: self.empty_parts].set(-jnp.inf)
        return lses.at[:, : self.empty_rows].set(-jnp.inf)

    def tiles(self, *, gpu: Gpu) -> MergeTiles:
        return choose_tiles(
            parts=self.parts, rows=self.length * self.q_heads, head_dim=self.head_dim, gpu=gpu
        )

    def other_tiles(self, *, gpu: Gpu) -> list[MergeTiles]:
        del gpu
        return [
            MergeTiles(
                block_parts=block_parts,
                block_columns=block_columns,
                num_warps=num_warps,
                num_stages=2,
            )
            for block_parts, block_columns, num_warps in itertools.product(
                sorted({min(x, power_of_two(self.parts)) for x in (32, 128)}), (32, 64, 128), (1, 4)
            )
        ]

    def cost(self) -> Cost:
        rows = self.length * self.q_heads
        return Cost(
            flops=2.0 * self.parts * rows * self.head_dim,  # not of matrices
            num_bytes=(self.parts + 1.0) * rows * (self.vector_bytes + 4),
        )

    def expected(
        self, arguments: tuple[Any, ...], *, rounded_to: DTypeLike | None = None
    ) -> tuple[np.ndarray, ...]:
        outs, lses = to_numpy((arguments[0], self.seen(arguments[1])))
        weights, lse = dense.softmax(np.moveaxis(lses, 0, -1))
        out = np.einsum("...p,p...h->...h", weights, outs.astype(np.float64))
        return out if rounded_to is None else out.astype(rounded_to), lse

    def equivalent(self, arguments: tuple[Any, ...]) -> NoReturn:
        del arguments
        raise UnsuitableError("they do not merge")


CASES: dict[str, MergeCase] = {
    "one part": MergeCase(parts=1, q_heads=4, head_dim=64),
    "two parts, one row": MergeCase(parts=2, q_heads=1, head_dim=64, dtype="float32"),
    "empty parts and rows": MergeCase(
        parts=5, empty_parts=2, length=3, empty_rows=1, q_heads=4, head_dim=64, dtype="float32"
    ),
    "many parts, 7 heads": MergeCase(parts=97, q_heads=7, dtype="float32"),
    "odd number of rows, head_dim 80": MergeCase(parts=3, length=97, q_heads=3, head_dim=80),
    "float16": MergeCase(parts=4, length=33, q_heads=4, dtype="float16"),
    "float32": MergeCase(parts=4, length=33, q_heads=4, dtype="float32"),
    "head_dim 96": MergeCase(parts=3, length=10, q_heads=4, head_dim=96),
    "head_dim 256": MergeCase(parts=3, length=10, q_heads=4, head_dim=256),
    "llama-3-8b, 16 heads in 108 parts": MergeCase(
        parts=108, q_heads=16, dtype="float32", compile_only=True
    ),
    "llama-3-8b, 32K queries in 2 parts": MergeCase(
        parts=2, length=32_000, q_heads=32, compile_only=True
    ),
}

AWKWARD: dict[str, MergeCase] = {
    "odd number of rows, head_dim 80": MergeCase(
        parts=3, length=97, q_heads=3, head_dim=80, dtype="float32"
    ),
}
