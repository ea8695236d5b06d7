"""Named cases of prefill attention."""

import dataclasses
from typing import Any

import jax
import numpy as np

from kernels import dense, stripes
from kernels.cached_case import CachedCase, per_format
from kernels.case import Cost, Piece, per_row
from kernels.dispatch import Implementation
from kernels.equivalent import Call, Equivalent, UnsuitableError, tokens_first
from kernels.gpu import Gpu
from kernels.mosaic import tiles as mosaic_tiles
from kernels.prefill.api import prefill_attention
from kernels.prefill.heuristic import choose_tiles
from kernels.tiles import LONG_WALKS, AttentionTiles

_MOST_PAIRS = 2**30  # queries x keys of one head, for which XLA's loop on a GPU takes seconds
_PIECE = 256  # queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCase(CachedCase):
    """`length` new tokens per row, at positions from `starts` on, over `slots` slots."""

    starts: tuple[int, ...]
    length: int
    shares: int = 1  # caches that share the text

    def positions(self) -> np.ndarray:
        """Return the positions of all slots."""
        return stripes.position(np.arange(self.slots), self.shares)

    def shapes(self) -> tuple[Any, ...]:
        batch = len(self.starts)
        q = self.array(batch, self.length, self.q_heads, self.head_dim)
        table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.table(batch)]
        return q, *self.cache(batch), per_row(batch), *table

    def integers(self) -> list[np.ndarray]:
        return [np.array(self.starts), *self.table(len(self.starts))]

    def run(
        self, *arguments: Any, implementation: Implementation, tiles: AttentionTiles | None = None
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v, starts, *pages = arguments
        return prefill_attention(
            q,
            k,
            v,
            starts,
            pages=pages[0] if pages else None,
            shares=self.shares,
            softmax_scale=self.softmax_scale,
            implementation=implementation,
            tiles=tiles,
        )

    def tiles(self, *, gpu: Gpu) -> AttentionTiles:
        return choose_tiles(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def other_tiles(self, *, gpu: Gpu) -> list[AttentionTiles]:
        del gpu
        return [] if self.bits else list(LONG_WALKS)  # packed keys are read by the plain kernel

    def mosaic_tiles(self, *, gpu: Gpu) -> list[AttentionTiles]:
        del gpu
        chosen = mosaic_tiles.for_attention(length=self.length, head_dim=self.head_dim)
        return [chosen] if self.bits else mosaic_tiles.attention_candidates(chosen)

    def cost(self) -> Cost:
        ends = [start + 1 + np.arange(self.length) for start in self.starts]
        seen = [np.searchsorted(self.positions(), end) for end in ends]
        return self.cost_of(
            pairs=int(sum(x.sum() for x in seen)),
            queries=len(self.starts) * self.length,
            keys=int(sum(x.max() for x in seen)),
        )

    def parts(self, arguments: tuple[Any, ...]) -> list[dense.Part]:
        starts, (k, v) = arguments[3], self.rows_of(arguments)
        mask = dense.causal_mask(starts, self.length, self.positions())
        return [dense.Part(keys=k, values=v, mask=mask)]

    def equivalent(self, arguments: tuple[Any, ...]) -> Equivalent:
        if self.bits is not None:
            raise UnsuitableError("they do not read packed keys")
        if self.page_size is not None:
            raise UnsuitableError("their pages lie otherwise")
        if self.shares > 1:
            raise UnsuitableError("their masks know no stripes")
        if len(self.starts) > 1:
            raise UnsuitableError("not a call of theirs")
        (start,) = list(self.starts)
        q, k, v, _ = arguments
        chunk, past = (
            [tokens_first(x[:, :, part]) for x in (k, v)]
            for part in (slice(start, start + self.length), slice(start))
        )
        calls = [Call(q=q, k=chunk[0], v=chunk[1], causal=True)]
        if not start:
            return Equivalent(calls=calls)
        calls.append(Call(q=q, k=past[0], v=past[1], causal=False))
        return Equivalent(calls=calls, note="the past without mask and the chunk, not merged")

    def pieces(self) -> list[Piece]:
        """Return the first, middle and last queries where XLA would take minutes for all."""
        pairs = self.length * (max(self.starts) + self.length)
        if self.length <= 3 * _PIECE or pairs <= _MOST_PAIRS:
            return super().pieces()
        middle = (self.length - _PIECE) // 2 + 1  # not at the edge of a tile
        return [
            Piece(
                name=f"queries {first} to {first + _PIECE - 1}",
                case=dataclasses.replace(
                    self, length=_PIECE, starts=tuple(start + first for start in self.starts)
                ),
                first=first,
                end=first + _PIECE,
            )
            for first in (0, middle, self.length - _PIECE)
        ]


_PAGED = PrefillCase(
    starts=(30_000,),
    length=2_048,
    slots=32_768,
    q_heads=16,
    kv_heads=4,
    page_size=64,
    compile_only=True,
)

CASES: dict[str, PrefillCase] = {
    "one token": PrefillCase(starts=(0,), length=1, slots=40, q_heads=4, kv_heads=2, head_dim=64),
    "three tokens, ragged": PrefillCase(
        starts=(0, 30, 37), length=3, slots=40, q_heads=4, kv_heads=2, head_dim=64
    ),
    "group of 7, odd length": PrefillCase(
        starts=(5, 0), length=97, slots=102, q_heads=14, kv_heads=2, head_dim=64
    ),
    "group of 1, head_dim 80": PrefillCase(
        starts=(31,), length=65, slots=128, q_heads=3, kv_heads=3, head_dim=80
    ),
    "more than one block": PrefillCase(
        starts=(150, 3), length=259, slots=500, q_heads=8, kv_heads=2
    ),
    "float16": PrefillCase(
        starts=(64,), length=129, slots=256, q_heads=4, kv_heads=1, dtype="float16"
    ),
    "float32": PrefillCase(
        starts=(64,), length=129, slots=256, q_heads=4, kv_heads=1, dtype="float32"
    ),
    "float32, head_dim 64, odd length": PrefillCase(
        starts=(0,), length=1001, slots=1001, q_heads=1, kv_heads=1, head_dim=64, dtype="float32"
    ),
    "head_dim 96": PrefillCase(
        starts=(10,), length=70, slots=80, q_heads=4, kv_heads=1, head_dim=96
    ),
    "head_dim 256": PrefillCase(
        starts=(10,), length=70, slots=80, q_heads=8, kv_heads=1, head_dim=256
    ),
    "llama-3-8b, all heads, first 32K": PrefillCase(
        starts=(0,), length=32_000, slots=32_000, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-3-8b, 4 retrieval heads, 32K at 288K": PrefillCase(
        starts=(288_000,), length=32_000, slots=320_000, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-2-7b, 8 retrieval heads, 10K at 90K": PrefillCase(
        starts=(90_000,), length=10_000, slots=100_000, q_heads=8, kv_heads=8, compile_only=True
    ),
    "llama-3-8b, 2K at 30K, pages of 64": _PAGED,
    "stripes of 3 caches, the second": PrefillCase(
        starts=(236, -100), length=259, slots=192, q_heads=8, kv_heads=2, shares=3
    ),
    "llama-3-8b, 4 retrieval heads, 32K at 288K on the last of 8": PrefillCase(
        starts=(288_000 - 7 * 64,),
        length=32_000,
        slots=40_000,
        q_heads=16,
        kv_heads=4,
        shares=8,
        compile_only=True,
    ),
}

PACKED: dict[str, PrefillCase] = per_format(
    {
        "three tokens, one before the start": PrefillCase(
            starts=(-1, 30, 61), length=3, slots=64, q_heads=4, kv_heads=2, head_dim=64
        ),
        "group of 7, head_dim 80": PrefillCase(
            starts=(31, 0), length=65, slots=128, q_heads=7, kv_heads=1, head_dim=80
        ),
        "more than one block": PrefillCase(
            starts=(150,), length=131, slots=320, q_heads=4, kv_heads=2
        ),
        "head_dim 256, float16": PrefillCase(
            starts=(10,), length=70, slots=128, q_heads=2, kv_heads=1, head_dim=256, dtype="float16"
        ),
        "float32": PrefillCase(
            starts=(64,), length=97, slots=192, q_heads=4, kv_heads=1, dtype="float32"
        ),
        "llama-3-8b, 4 retrieval heads, 32K at 288K": PrefillCase(
            starts=(288_000,), length=32_000, slots=320_000, q_heads=16, kv_heads=4,
            compile_only=True,
        ),
        "llama-3-8b, 2K at 30K, pages of 64": _PAGED,
    }
)  # fmt: skip

_TINY: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
AWKWARD: dict[str, PrefillCase] = {
    "one token in one slot": PrefillCase(length=1, slots=1, starts=(0,), **_TINY),
    "one token": PrefillCase(length=1, slots=40, starts=(0, 39, 11), **_TINY),
    "three tokens": PrefillCase(length=3, slots=40, starts=(0, 37), **_TINY),
    "three tokens in four slots": PrefillCase(length=3, slots=4, starts=(0, 1), **_TINY),
    "29 tokens": PrefillCase(length=29, slots=60, starts=(0, 28, 31), **_TINY),
    "odd length, group of 7": PrefillCase(
        length=97, slots=200, starts=(3, 0), **dict(_TINY, q_heads=14)
    ),
    "group of 1, head_dim 80": PrefillCase(
        length=97, slots=97, starts=(0,), q_heads=3, kv_heads=3, head_dim=80, dtype="float32"
    ),
    "group of 4, head_dim 96": PrefillCase(
        length=65, slots=97, starts=(32, 0), q_heads=8, kv_heads=2, head_dim=96, dtype="float32"
    ),
    "exactly one block of slots": PrefillCase(length=512, slots=512, starts=(0,), **_TINY),
    "one slot past a block": PrefillCase(length=97, slots=513, starts=(416, 415, 0), **_TINY),
    "one slot past two blocks": PrefillCase(length=300, slots=1025, starts=(725, 300, 0), **_TINY),
    "rows far apart": PrefillCase(length=20, slots=1700, starts=(0, 1680, 500), **_TINY),
    "stripes, rows that end in others' stripes": PrefillCase(
        length=97, slots=200, starts=(-130, -1, 0, 31, 500, 1_000), shares=5, **_TINY
    ),
    "stripes, pages of 64": PrefillCase(
        length=65, slots=192, starts=(250, 100), shares=2, page_size=64, **_TINY
    ),
    "stripes, more than a block": PrefillCase(
        length=300, slots=600, starts=(1_500, 790), shares=3, **_TINY
    ),
}
