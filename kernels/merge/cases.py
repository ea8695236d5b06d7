"""Named cases of merging."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.case import Case, Cost
from kernels.gpu import Gpu
from kernels.merge.api import merge_lse
from kernels.merge.config import BlockSizes, heuristic


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeCase(Case):
    """`parts` parts of attention, for `length` queries of each head."""

    kv_heads: int = 1  # nothing here asks
    parts: int
    length: int = 1
    empty_parts: int = 0  # the first ones saw no key
    empty_rows: int = 0  # nor did the first queries in any part

    def shapes(self):
        rows = (self.parts, self.length, self.q_heads)
        return self.array(*rows, self.head_dim), jax.ShapeDtypeStruct(rows, jnp.float32)

    def integers(self):
        return []

    def run(self, outs, lses, *, implementation, block_sizes=None):
        return merge_lse(
            outs, self.seen(lses), implementation=implementation, block_sizes=block_sizes
        )

    def seen(self, lses):
        """Return lses with -inf for the case's empty parts and rows."""
        lses = jnp.asarray(lses).at[: self.empty_parts].set(-jnp.inf)
        return lses.at[:, : self.empty_rows].set(-jnp.inf)

    def block_sizes(self, *, gpu: Gpu) -> BlockSizes:
        return heuristic(rows=self.length * self.q_heads, head_dim=self.head_dim, gpu=gpu)

    def cost(self, *, gpu: Gpu) -> Cost:
        del gpu
        rows = self.length * self.q_heads
        flops = 2.0 * self.parts * rows * self.head_dim  # not of matrices
        num_bytes = (self.parts + 1.0) * rows * (self.head_dim * self.itemsize + 4)
        return Cost(
            flops=flops, num_bytes=num_bytes, scheduled_flops=flops, scheduled_bytes=num_bytes
        )


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
