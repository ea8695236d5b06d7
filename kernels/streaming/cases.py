"""Named cases of streaming attention: chunks with a past, and gradients of whole sequences."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels import dense
from kernels.case import AttentionCase, Cost, per_row, to_numpy
from kernels.dispatch import Implementation
from kernels.equivalent import Call, Equivalent
from kernels.gpu import Gpu
from kernels.mosaic import tiles as mosaic_tiles
from kernels.streaming.api import streaming_attention
from kernels.streaming.heuristic import choose_tiles
from kernels.streaming.past import Past
from kernels.tiles import SHORT_WALKS, ForwardBackwardTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingCase(AttentionCase):
    """`length` new tokens per row after `lengths` past ones; no `lengths`: a whole sequence."""

    length: int
    sink_size: int = 128
    recent_size: int = 256
    lengths: tuple[int, ...] = ()
    batch: int = 1  # of a whole sequence
    gradient: bool = False  # run returns the gradients of q, k and v instead

    def shapes(self) -> tuple[Any, ...]:
        batch = len(self.lengths) or self.batch
        q = self.array(batch, self.length, self.q_heads, self.head_dim)
        kv = self.array(batch, self.length, self.kv_heads, self.head_dim)
        if self.gradient:
            return q, kv, kv, q
        if not self.lengths:
            return q, kv, kv
        sinks = self.array(batch, self.kv_heads, self.sink_size, self.head_dim)
        recents = self.array(batch, self.kv_heads, self.recent_size, self.head_dim)
        return q, kv, kv, _past(sinks, sinks, recents, recents, per_row(batch))

    def integers(self) -> list[np.ndarray]:
        return [np.array(self.lengths)] if self.lengths else []

    def run(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        *past_or_d_out: Any,
        implementation: Implementation,
        tiles: ForwardBackwardTiles | None = None,
    ) -> tuple[jax.Array, ...]:
        def attend(q, k, v, past=None):
            return streaming_attention(
                q,
                k,
                v,
                sink_size=self.sink_size,
                recent_size=self.recent_size,
                softmax_scale=self.softmax_scale,
                past=past,
                implementation=implementation,
                tiles=tiles,
            )

        if not self.gradient:
            return attend(q, k, v, *past_or_d_out)
        _, pull_back = jax.vjp(lambda *qkv: attend(*qkv)[0], q, k, v)
        return pull_back(*past_or_d_out)

    def tiles(self, *, gpu: Gpu) -> ForwardBackwardTiles:
        return choose_tiles(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def other_tiles(self, *, gpu: Gpu) -> Sequence[ForwardBackwardTiles]:
        part = "backward" if self.gradient else "forward"
        chosen = self.tiles(gpu=gpu)
        return [dataclasses.replace(chosen, **{part: tiles}) for tiles in SHORT_WALKS]

    def mosaic_tiles(self, *, gpu: Gpu) -> list[ForwardBackwardTiles]:
        del gpu
        chosen = mosaic_tiles.for_sequence(
            length=self.length, head_dim=self.head_dim, window=self.recent_size
        )
        return mosaic_tiles.sequence_candidates(chosen)

    def cost(self) -> Cost:
        starts = np.array(self.lengths or (0,) * self.batch)
        positions = starts[:, None] + np.arange(self.length)
        # The chunk's own tokens, the recents of its first query, and the sinks before them.
        keys = self.length + np.minimum(starts, self.recent_size - 1 + self.sink_size)
        return self.cost_of(
            pairs=int(np.minimum(positions + 1, self.sink_size + self.recent_size).sum()),
            queries=positions.size,
            keys=int(keys.sum()),
        )

    def parts(self, arguments: tuple[Any, ...]) -> list[dense.Part]:
        k, v = (np.moveaxis(x, 2, 1) for x in arguments[1:3])
        own = np.arange(self.length)[None]
        if not self.lengths:
            starts = np.zeros(self.batch, int)
            return [dense.Part(keys=k, values=v, mask=self._mask(starts, own))]
        past = arguments[3]
        starts, before = past.lengths, past.lengths[:, None]

        def mask_without_sinks(positions: np.ndarray) -> np.ndarray:
            """Sinks are among the cached sinks, and not counted again."""
            return self._mask(starts, positions) & (positions >= self.sink_size)[:, None]

        return [
            dense.Part(
                keys=past.sink_keys,
                values=past.sink_values,
                mask=self._mask(starts, np.arange(self.sink_size)[None]),
            ),
            dense.Part(
                keys=past.recent_keys,
                values=past.recent_values,
                mask=mask_without_sinks(before + np.arange(-self.recent_size, 0)),
            ),
            dense.Part(keys=k, values=v, mask=mask_without_sinks(before + own)),
        ]

    def _mask(self, starts: np.ndarray, kv_positions: np.ndarray) -> np.ndarray:
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        return dense.streaming_mask(starts, self.length, kv_positions, **sizes)

    def with_stale(
        self, arguments: tuple[Any, ...], *, keys: float = dense.STALE, values: float = -dense.STALE
    ) -> tuple[Any, ...]:
        if not self.lengths:
            return arguments
        *chunk, past = arguments
        sinks, recents, _ = self.parts(to_numpy(arguments))
        return *chunk, _past(*sinks.stale(keys, values), *recents.stale(keys, values), past.lengths)

    def equivalent(self, arguments: tuple[Any, ...]) -> Equivalent:
        q, k, v, *rest = arguments
        d_out = rest[0] if self.gradient else None
        call = Call(q=q, k=k, v=v, causal=True, window=self.recent_size, d_out=d_out)
        return Equivalent(calls=[call], note="a sliding window only: no sinks, no past")


def _past(*leaves: Any) -> Past:
    """Build a Past of anything, which a type checker of its fields may refuse."""
    example = Past(**dict.fromkeys(_FIELDS, jnp.zeros((1, 1, 1, 1))), lengths=jnp.zeros(1, int))
    return jax.tree.unflatten(jax.tree.structure(example), leaves)


_FIELDS = ("sink_keys", "sink_values", "recent_keys", "recent_values")
_TINY: dict[str, Any] = {
    "sink_size": 4,
    "recent_size": 24,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
}

CASES: dict[str, StreamingCase] = {
    "one token": StreamingCase(length=1, **_TINY),
    "three tokens": StreamingCase(length=3, **_TINY),
    "one token before the sinks' end": StreamingCase(length=3, lengths=(0, 1), **_TINY),
    "sink + recent": StreamingCase(length=28, **_TINY),
    "sink + recent + 1": StreamingCase(length=29, **_TINY),
    "odd length, rows of many pasts": StreamingCase(length=97, lengths=(0, 3, 27, 150), **_TINY),
    "a chunk shorter than the window": StreamingCase(length=7, lengths=(150, 12), **_TINY),
    "no sinks": StreamingCase(
        length=97, sink_size=0, recent_size=24, q_heads=4, kv_heads=2, head_dim=64
    ),
    "group of 7, head_dim 80": StreamingCase(
        length=65, lengths=(40,), sink_size=4, recent_size=24, q_heads=7, kv_heads=1, head_dim=80
    ),
    "published sizes": StreamingCase(length=300, lengths=(1000, 130), q_heads=4, kv_heads=1),
    "float16": StreamingCase(length=140, lengths=(500,), q_heads=2, kv_heads=2, dtype="float16"),
    "float32": StreamingCase(length=140, lengths=(500,), q_heads=2, kv_heads=2, dtype="float32"),
    "head_dim 96": StreamingCase(length=70, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": StreamingCase(length=70, q_heads=4, kv_heads=1, head_dim=256),
    "gradient, three tokens": StreamingCase(length=3, gradient=True, **_TINY),
    "gradient, odd length": StreamingCase(length=97, batch=2, gradient=True, **_TINY),
    "gradient, no sinks": StreamingCase(
        length=97, sink_size=0, recent_size=24, q_heads=4, kv_heads=2, head_dim=64, gradient=True
    ),
    "gradient, group of 7, head_dim 80": StreamingCase(
        length=130, sink_size=20, recent_size=40, q_heads=7, kv_heads=1, head_dim=80, gradient=True
    ),
    "gradient, group of 1, float16": StreamingCase(
        length=200,
        sink_size=16,
        recent_size=64,
        q_heads=2,
        kv_heads=2,
        dtype="float16",
        gradient=True,
    ),
    "gradient, group of 1, head_dim 96": StreamingCase(
        length=201, sink_size=16, recent_size=64, q_heads=2, kv_heads=2, head_dim=96, gradient=True
    ),
    "gradient, float32": StreamingCase(
        length=200,
        sink_size=16,
        recent_size=64,
        q_heads=4,
        kv_heads=1,
        dtype="float32",
        gradient=True,
    ),
    "gradient, head_dim 256": StreamingCase(
        length=70, sink_size=16, recent_size=32, q_heads=2, kv_heads=1, head_dim=256, gradient=True
    ),
    "llama-3-8b, 4 streaming heads, 32K at 288K": StreamingCase(
        length=32_000, lengths=(288_000,), q_heads=16, kv_heads=4, compile_only=True
    ),
    "llama-3-8b, gradient at 32K": StreamingCase(
        length=32_000, q_heads=32, kv_heads=8, gradient=True, compile_only=True
    ),
    "llama-2-7b, 24 streaming heads, 10K at 90K": StreamingCase(
        length=10_000, lengths=(90_000,), q_heads=24, kv_heads=24, compile_only=True
    ),
}

_WHOLE: dict[str, Any] = dict(_TINY, head_dim=16, batch=2, dtype="float32")
_CHUNK: dict[str, Any] = dict(_TINY, head_dim=16, dtype="float32")
_GROUP_OF_7: dict[str, Any] = {"q_heads": 7, "kv_heads": 1}
_GROUP_OF_1: dict[str, Any] = {"q_heads": 3, "kv_heads": 3}
_PUBLISHED: dict[str, Any] = {"sink_size": 128, "recent_size": 256, "head_dim": 128, "kv_heads": 1}
AWKWARD: dict[str, StreamingCase] = {
    "one token": StreamingCase(length=1, **_WHOLE),
    "three tokens": StreamingCase(length=3, **_WHOLE),
    "sinks only": StreamingCase(length=4, **_WHOLE),
    "one short of sink + recent": StreamingCase(length=27, **_WHOLE),
    "sink + recent": StreamingCase(length=28, **_WHOLE),
    "one past sink + recent": StreamingCase(length=29, **_WHOLE),
    "odd length, group of 7": StreamingCase(length=97, **_WHOLE | _GROUP_OF_7),
    "several blocks, group of 1": StreamingCase(length=300, **_WHOLE | _GROUP_OF_1),
    "no sinks": StreamingCase(length=97, **dict(_WHOLE, sink_size=0)),
    "recent is the token itself": StreamingCase(length=97, **dict(_WHOLE, recent_size=1)),
    "recent longer than the text": StreamingCase(length=97, **dict(_WHOLE, recent_size=200)),
    "sinks longer than the text": StreamingCase(length=97, **dict(_WHOLE, sink_size=120)),
    "head_dim 80": StreamingCase(length=65, **dict(_WHOLE, head_dim=80)),
    "published sizes": StreamingCase(length=515, **dict(_WHOLE | _PUBLISHED, batch=1)),
    "chunk of one token": StreamingCase(length=1, lengths=(0, 3, 27, 28, 29), **_CHUNK),
    "chunk of three tokens": StreamingCase(length=3, lengths=(0, 1, 3, 4, 200), **_CHUNK),
    "chunk one short of sink + recent": StreamingCase(
        length=27, lengths=(0, 1, 27, 28, 55), **_CHUNK
    ),
    "chunk of sink + recent": StreamingCase(length=28, lengths=(0, 28, 2), **_CHUNK),
    "chunk one past sink + recent": StreamingCase(length=29, lengths=(0, 29, 3), **_CHUNK),
    "chunk of odd length, group of 7": StreamingCase(
        length=97, lengths=(0, 5, 97), **_CHUNK | _GROUP_OF_7
    ),
    "chunk of several blocks, group of 1": StreamingCase(
        length=300, lengths=(0, 130), **_CHUNK | _GROUP_OF_1
    ),
    "chunk, no sinks": StreamingCase(length=40, lengths=(0, 10, 40), **dict(_CHUNK, sink_size=0)),
    "chunk, recent is the token itself": StreamingCase(
        length=40, lengths=(0, 2, 40), **dict(_CHUNK, recent_size=1)
    ),
    "chunk, recent one past a block": StreamingCase(
        length=20, lengths=(0, 16, 40), **dict(_CHUNK, recent_size=17)
    ),
    "chunk, recent longer than the text": StreamingCase(
        length=20, lengths=(0, 30), **dict(_CHUNK, recent_size=200)
    ),
    "chunk, sinks longer than the text": StreamingCase(
        length=20, lengths=(0, 7, 90), **dict(_CHUNK, sink_size=120)
    ),
    "chunk, head_dim 80": StreamingCase(length=33, lengths=(0, 50), **dict(_CHUNK, head_dim=80)),
    "chunk, published sizes": StreamingCase(
        length=100, lengths=(0, 60, 383, 500), **_CHUNK | _PUBLISHED
    ),
    "gradient, three tokens": StreamingCase(length=3, gradient=True, **_WHOLE),
    "gradient, odd length, group of 7": StreamingCase(
        length=97, gradient=True, **_WHOLE | _GROUP_OF_7
    ),
    "gradient, no sinks": StreamingCase(length=97, gradient=True, **dict(_WHOLE, sink_size=0)),
    "gradient, one past sink + recent": StreamingCase(length=29, gradient=True, **_WHOLE),
}
