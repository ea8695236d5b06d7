"""Named cases of decode attention."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kernels import dense
from kernels.cached_case import CachedCase, per_format
from kernels.case import Cost, per_row
from kernels.decode.api import decode_attention
from kernels.decode.heuristic import choose_tiles
from kernels.dispatch import Implementation
from kernels.equivalent import Call, Equivalent, UnsuitableError, tokens_first
from kernels.gpu import Gpu
from kernels.mosaic import tiles as mosaic_tiles
from kernels.tile_io import cdiv
from kernels.tiles import DecodeTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase(CachedCase):
    """One query per row over `slots` slots, of which `lengths` are filled."""

    lengths: tuple[int, ...]

    def shapes(self) -> tuple[Any, ...]:
        batch = len(self.lengths)
        q = self.array(batch, self.q_heads, self.head_dim)
        table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.table(batch)]
        return q, *self.cache(batch), per_row(batch), *table

    def integers(self) -> list[np.ndarray]:
        return [np.array(self.lengths), *self.table(len(self.lengths))]

    def run(
        self, *arguments: Any, implementation: Implementation, tiles: DecodeTiles | None = None
    ) -> tuple[jax.Array, jax.Array]:
        q, k, v, lengths, *pages = arguments
        return decode_attention(
            q,
            k,
            v,
            lengths,
            pages=pages[0] if pages else None,
            softmax_scale=self.softmax_scale,
            implementation=implementation,
            tiles=tiles,
        )

    def tiles(self, *, gpu: Gpu) -> DecodeTiles:
        return choose_tiles(
            batch=len(self.lengths),
            kv_heads=self.kv_heads,
            slots=self.slots,
            head_dim=self.head_dim,
            dtype=self.dtype,
            gpu=gpu,
            layout=self.layout,
        )

    def other_tiles(self, *, gpu: Gpu) -> list[DecodeTiles]:
        programs = len(self.lengths) * self.kv_heads
        found = [
            DecodeTiles(
                block_kv=block_kv,
                num_splits=max(
                    1, min(cdiv(waves * gpu.num_cores, programs), cdiv(self.slots, block_kv))
                ),
                num_warps=num_warps,
                num_stages=num_stages,
            )
            for waves, (block_kv, num_warps), num_stages in itertools.product(*self._other_sizes())
        ]
        # In 2 bits a tile has at most 32 tokens: the words of a block of 64 hold two each.
        return [x for x in found if self.bits != 2 or x.block_kv <= 32]

    def _other_sizes(self) -> tuple[Sequence[int], Sequence[tuple[int, int]], Sequence[int]]:
        """Return programs per core, (tokens per tile, warps), and stages to combine."""
        if self.bits is None:
            return (2, 3, 4, 8), ((64, 4), (128, 4), (32, 2), (128, 8), (32, 4)), (3, 2, 4)
        return (12, 8, 14, 16), ((16, 1), (32, 1), (16, 2), (32, 2)), (3, 4)

    def mosaic_tiles(self, *, gpu: Gpu) -> list[DecodeTiles]:
        return mosaic_tiles.decode_candidates(
            batch=len(self.lengths),
            kv_heads=self.kv_heads,
            slots=self.slots,
            head_dim=self.head_dim,
            packed=self.bits is not None,
            gpu=gpu,
        )

    def cost(self) -> Cost:
        tokens = sum(self.lengths)
        return self.cost_of(pairs=tokens, queries=len(self.lengths), keys=tokens)

    def parts(self, arguments: tuple[Any, ...]) -> list[dense.Part]:
        lengths, (k, v) = arguments[3], self.rows_of(arguments)
        mask = np.arange(self.slots)[None, None] < lengths[:, None, None]
        return [dense.Part(keys=k, values=v, mask=mask)]

    def expected(
        self, arguments: tuple[Any, ...], *, rounded_to: DTypeLike | None = None
    ) -> tuple[np.ndarray, ...]:
        q, *rest = arguments
        out, lse = super().expected((jnp.expand_dims(q, 1), *rest), rounded_to=rounded_to)
        return out[:, 0], lse[:, 0]

    def equivalent(self, arguments: tuple[Any, ...]) -> Equivalent:
        if self.bits is not None:
            raise UnsuitableError("they do not read packed keys")
        if self.page_size is not None:
            raise UnsuitableError("their pages lie otherwise")
        if len(set(self.lengths)) > 1:
            raise UnsuitableError("rows have different lengths")
        q, k, v, _ = arguments
        k, v = (tokens_first(x[:, :, : self.lengths[0]]) for x in (k, v))
        return Equivalent(calls=[Call(q=q[:, None], k=k, v=v, causal=False)])


_PAGED = DecodeCase(
    lengths=(32_768,) * 16,
    slots=32_768,
    q_heads=16,
    kv_heads=4,
    page_size=64,
    compile_only=True,
)
_PAGED_64 = dataclasses.replace(
    _PAGED, lengths=(8_192, 100), slots=8_192, q_heads=9, kv_heads=3, head_dim=64, page_size=256
)

CASES: dict[str, DecodeCase] = {
    "one token": DecodeCase(lengths=(1,), slots=40, q_heads=4, kv_heads=2, head_dim=64),
    "empty rows": DecodeCase(lengths=(0, 5, 0), slots=97, q_heads=4, kv_heads=2, head_dim=64),
    "group of 7, odd length": DecodeCase(
        lengths=(97, 96), slots=97, q_heads=14, kv_heads=2, head_dim=64
    ),
    "group of 1, head_dim 80": DecodeCase(
        lengths=(97, 3), slots=128, q_heads=3, kv_heads=3, head_dim=80
    ),
    "ring of 384, just filled": DecodeCase(lengths=(384, 383), slots=384, q_heads=8, kv_heads=2),
    "ragged rows": DecodeCase(lengths=(1, 1025, 3000, 512), slots=3001, q_heads=8, kv_heads=2),
    "float16": DecodeCase(lengths=(1025,), slots=1100, q_heads=8, kv_heads=2, dtype="float16"),
    "float32": DecodeCase(lengths=(1025,), slots=1100, q_heads=8, kv_heads=2, dtype="float32"),
    "head_dim 96": DecodeCase(lengths=(300,), slots=333, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": DecodeCase(lengths=(300,), slots=333, q_heads=8, kv_heads=1, head_dim=256),
    "llama-3-8b, 4 retrieval heads at 517K": DecodeCase(
        lengths=(517_000,), slots=517_120, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-3-8b, all heads at 517K": DecodeCase(
        lengths=(517_000,), slots=517_120, q_heads=32, kv_heads=8, compile_only=True
    ),
    "llama-3-8b, 4 streaming heads": DecodeCase(
        lengths=(384,), slots=384, q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-2-7b, 8 retrieval heads at 134K": DecodeCase(
        lengths=(134_000,), slots=134_144, q_heads=8, kv_heads=8, compile_only=True
    ),
    "llama-2-7b, all heads at 134K": DecodeCase(
        lengths=(134_000,), slots=134_144, q_heads=32, kv_heads=32, compile_only=True
    ),
    "llama-3-8b, 16 rows at 32K, pages of 64": _PAGED,
    "head_dim 64, group of 3, pages of 256": _PAGED_64,
}

PACKED: dict[str, DecodeCase] = per_format(
    {
        "empty rows": DecodeCase(lengths=(0, 5, 0), slots=128, q_heads=4, kv_heads=2, head_dim=64),
        "ragged rows": DecodeCase(lengths=(1, 1025, 97, 64), slots=1088, q_heads=8, kv_heads=2),
        "group of 7, head_dim 80": DecodeCase(
            lengths=(97, 96), slots=128, q_heads=14, kv_heads=2, head_dim=80
        ),
        "head_dim 256, float16": DecodeCase(
            lengths=(300,), slots=320, q_heads=4, kv_heads=1, head_dim=256, dtype="float16"
        ),
        "float32": DecodeCase(lengths=(333,), slots=384, q_heads=8, kv_heads=2, dtype="float32"),
        "llama-3-8b, 4 retrieval heads at 500K": DecodeCase(
            lengths=(500_000,), slots=500_032, q_heads=16, kv_heads=4, compile_only=True
        ),
        "llama-3-8b, 16 rows at 32K, pages of 64": _PAGED,
        "head_dim 64, group of 3, pages of 256": _PAGED_64,
    }
) | {
    "int4, llama-3-8b, 8 retrieval heads at 4M": DecodeCase(
        bits=4, lengths=(4_000_000,), slots=4_000_000, q_heads=32, kv_heads=8, compile_only=True
    )
}

_TINY: dict[str, Any] = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
AWKWARD: dict[str, DecodeCase] = {
    "one token in one slot": DecodeCase(lengths=(1,), slots=1, **_TINY),
    "around a ring's size": DecodeCase(lengths=(3, 4, 27, 28, 29), slots=40, **_TINY),
    "a ring, not yet and just filled": DecodeCase(lengths=(27, 28), slots=28, **_TINY),
    "only empty rows": DecodeCase(lengths=(0, 0), slots=9, **_TINY),
    "empty rows, group of 7": DecodeCase(lengths=(0, 97, 96), slots=97, **dict(_TINY, q_heads=14)),
    "group of 1, head_dim 80": DecodeCase(
        lengths=(97, 1), slots=97, q_heads=3, kv_heads=3, head_dim=80, dtype="float32"
    ),
    "exactly one block": DecodeCase(lengths=(511, 512, 7), slots=512, **_TINY),
    "one slot past a block": DecodeCase(lengths=(511, 512, 513), slots=513, **_TINY),
    "one slot past two blocks": DecodeCase(lengths=(1023, 1024, 1025, 513, 0), slots=1025, **_TINY),
    "ragged rows in a full cache": DecodeCase(lengths=(1, 700, 1600, 512), slots=1700, **_TINY),
    "ragged rows in blocks of an empty cache": DecodeCase(
        lengths=(1, 700, 1600, 512, 0), slots=3300, **_TINY
    ),
    "half full": DecodeCase(lengths=(1000, 3), slots=2000, **_TINY),
    "one token less than half full": DecodeCase(lengths=(999, 3), slots=2000, **_TINY),
    "one slot more than a block, nearly half full": DecodeCase(lengths=(256,), slots=513, **_TINY),
}
