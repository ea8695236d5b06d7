"""Named cases of full attention, and of its gradients."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from kernels import dense
from kernels.case import AttentionCase, Cost
from kernels.dispatch import Implementation
from kernels.equivalent import Call, Equivalent
from kernels.full.api import full_attention
from kernels.full.heuristic import choose_tiles
from kernels.gpu import Gpu
from kernels.mosaic import tiles as mosaic_tiles
from kernels.tiles import LONG_WALKS, SHORT_WALKS, ForwardBackwardTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCase(AttentionCase):
    """`batch` whole sequences of `length` tokens."""

    length: int
    batch: int = 1
    gradient: bool = False  # run returns the gradients of q, k and v instead
    returns_lse: ClassVar[bool] = False

    def shapes(self) -> tuple[Any, ...]:
        q = self.array(self.batch, self.length, self.q_heads, self.head_dim)
        kv = self.array(self.batch, self.length, self.kv_heads, self.head_dim)
        return (q, kv, kv, q) if self.gradient else (q, kv, kv)

    def integers(self) -> list[np.ndarray]:
        return []

    def run(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        *d_out: Float[Array, "batch length q_heads head_dim"],
        implementation: Implementation,
        tiles: ForwardBackwardTiles | None = None,
    ) -> tuple[jax.Array, ...]:
        def attend(q, k, v):
            options = {"implementation": implementation, "tiles": tiles}
            return full_attention(q, k, v, softmax_scale=self.softmax_scale, **options)

        if not self.gradient:
            return (attend(q, k, v),)
        _, pull_back = jax.vjp(attend, q, k, v)
        return pull_back(*d_out)

    def tiles(self, *, gpu: Gpu) -> ForwardBackwardTiles:
        return choose_tiles(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def other_tiles(self, *, gpu: Gpu) -> Sequence[ForwardBackwardTiles]:
        chosen = self.tiles(gpu=gpu)
        if self.gradient:
            return [dataclasses.replace(chosen, backward=tiles) for tiles in SHORT_WALKS]
        return [dataclasses.replace(chosen, forward=tiles) for tiles in LONG_WALKS]

    def mosaic_tiles(self, *, gpu: Gpu) -> list[ForwardBackwardTiles]:
        del gpu
        chosen = mosaic_tiles.for_sequence(length=self.length, head_dim=self.head_dim)
        return mosaic_tiles.sequence_candidates(chosen)

    def cost(self) -> Cost:
        tokens = self.batch * self.length
        return self.cost_of(pairs=tokens * (self.length + 1) // 2, queries=tokens, keys=tokens)

    def parts(self, arguments: tuple[Any, ...]) -> list[dense.Part]:
        k, v = (np.moveaxis(x, 2, 1) for x in arguments[1:3])
        mask = dense.causal_mask(np.zeros(self.batch, int), self.length, np.arange(self.length))
        return [dense.Part(keys=k, values=v, mask=mask)]

    def equivalent(self, arguments: tuple[Any, ...]) -> Equivalent:
        q, k, v, *d_out = arguments
        call = Call(q=q, k=k, v=v, causal=True, d_out=d_out[0] if self.gradient else None)
        return Equivalent(calls=[call])


CASES: dict[str, FullCase] = {
    "one token": FullCase(length=1, q_heads=4, kv_heads=2, head_dim=64),
    "three tokens": FullCase(length=3, batch=2, q_heads=4, kv_heads=2, head_dim=64),
    "group of 7, odd length": FullCase(length=97, batch=2, q_heads=14, kv_heads=2, head_dim=64),
    "group of 1, head_dim 80": FullCase(length=129, q_heads=3, kv_heads=3, head_dim=80),
    "more than one block": FullCase(length=259, q_heads=8, kv_heads=2),
    "float16": FullCase(length=130, q_heads=4, kv_heads=1, dtype="float16"),
    "float32": FullCase(length=131, q_heads=4, kv_heads=1, dtype="float32"),
    "head_dim 96": FullCase(length=70, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": FullCase(length=70, q_heads=8, kv_heads=1, head_dim=256),
    "llama-3-8b, teacher at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-2-7b, teacher at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=32, compile_only=True
    ),
    "gradient, three tokens": FullCase(length=3, q_heads=4, kv_heads=2, head_dim=64, gradient=True),
    "gradient, odd length, group of 7": FullCase(
        length=97, batch=2, q_heads=7, kv_heads=1, head_dim=80, gradient=True
    ),
    "gradient, more than one block": FullCase(length=259, q_heads=4, kv_heads=2, gradient=True),
    "gradient, float32": FullCase(
        length=131, q_heads=2, kv_heads=2, head_dim=64, dtype="float32", gradient=True
    ),
    "gradient, head_dim 256": FullCase(
        length=70, q_heads=2, kv_heads=1, head_dim=256, gradient=True
    ),
    "llama-3-8b, gradient at 32K": FullCase(
        length=32_000, q_heads=32, kv_heads=8, gradient=True, compile_only=True
    ),
}

_TINY: dict[str, Any] = {
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "batch": 2,
    "dtype": "float32",
}
AWKWARD: dict[str, FullCase] = {
    "one token": FullCase(length=1, **_TINY),
    "three tokens": FullCase(length=3, **_TINY),
    "odd length, group of 7": FullCase(length=97, **dict(_TINY, q_heads=7, kv_heads=1)),
    "several blocks, group of 1": FullCase(length=300, **dict(_TINY, q_heads=3, kv_heads=3)),
    "head_dim 80": FullCase(length=65, **dict(_TINY, head_dim=80)),
    "four blocks, head_dim 128": FullCase(length=515, **dict(_TINY, head_dim=128, batch=1)),
    "gradient, odd length, group of 7": FullCase(
        length=97, gradient=True, **dict(_TINY, q_heads=7, kv_heads=1)
    ),
    "gradient, 29 tokens": FullCase(length=29, gradient=True, **_TINY),
}
