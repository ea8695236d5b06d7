"""Named cases of streaming attention: chunks behind a past, and gradients of whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.case import Case, Cost, per_row
from kernels.streaming.api import streaming_attention
from kernels.streaming.config import Config, heuristic
from kernels.streaming.past import Past
from kernels.tiles import cdiv


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingCase(Case):
    """`length` new tokens per row behind `lengths` past ones; no `lengths`: a whole sequence."""

    length: int
    sink: int = 128
    recent: int = 256
    lengths: tuple[int, ...] = ()
    batch: int = 1  # of a whole sequence
    gradient: bool = False  # run returns the gradients of q, k and v instead

    def shapes(self):
        batch = len(self.lengths) or self.batch
        q = self.array(batch, self.length, self.q_heads, self.head_dim)
        kv = self.array(batch, self.length, self.kv_heads, self.head_dim)
        if self.gradient:
            return q, kv, kv, q
        if not self.lengths:
            return q, kv, kv
        sinks = self.array(batch, self.kv_heads, self.sink, self.head_dim)
        recents = self.array(batch, self.kv_heads, self.recent, self.head_dim)
        return q, kv, kv, _past(sinks, recents, per_row(batch))

    def integers(self):
        return [np.array(self.lengths)] if self.lengths else []

    def run(self, q, k, v, *rest, implementation, block_sizes=None):
        def attend(q, k, v, past=None):
            return streaming_attention(
                q,
                k,
                v,
                sink_size=self.sink,
                recent_size=self.recent,
                softmax_scale=self.softmax_scale,
                past=past,
                implementation=implementation,
                config=block_sizes,
            )

        if not self.gradient:
            return attend(q, k, v, *rest)
        _, pull_back = jax.vjp(lambda *qkv: attend(*qkv)[0], q, k, v)
        return pull_back(rest[0])

    def block_sizes(self, *, num_cores: int) -> Config:
        del num_cores
        return heuristic(length=self.length, head_dim=self.head_dim, dtype=self.dtype)

    def cost(self, *, num_cores: int) -> Cost:
        sizes = self.block_sizes(num_cores=num_cores)
        pairs, tokens = 0, 0
        block_q, block_kv = sizes.forward.block_q, sizes.forward.block_kv
        rows = self.lengths or (0,) * self.batch
        for past in rows:
            positions = past + np.arange(self.length)
            pairs += int(np.minimum(positions + 1, self.sink + self.recent).sum())
            for first in range(0, self.length, block_q):
                tokens += block_kv * self._tiles(past, first, block_q, block_kv)
        per_pair = 4.0 * self.q_heads * self.head_dim
        vectors = len(rows) * self.length
        vector_bytes = self.head_dim * self.itemsize
        q_bytes = vectors * self.q_heads * vector_bytes
        kv_bytes = vectors * self.kv_heads * vector_bytes
        forward = Cost(
            flops=per_pair * pairs,
            num_bytes=2.0 * q_bytes + 2 * kv_bytes,
            scheduled_flops=per_pair * tokens * block_q,
            scheduled_bytes=2.0 * q_bytes + 2.0 * tokens * self.q_heads * vector_bytes,
        )
        if not self.gradient:
            return forward
        # The forward pass, then five products: d_q needs three of them, d_k and d_v four.
        return Cost(
            flops=forward.flops * (1 + 2.5),
            num_bytes=forward.num_bytes + 4.0 * q_bytes + 4 * kv_bytes,
            scheduled_flops=forward.scheduled_flops * (1 + 3.5),
            scheduled_bytes=forward.scheduled_bytes * 3.5,
        )

    def _tiles(self, past: int, first: int, block_q: int, block_kv: int) -> int:
        """Count the key tiles that one program visits, as the kernel's loops do."""
        count = cdiv(min(past + first + block_q, self.sink), block_kv)
        window = first - (self.recent - 1)
        if self.lengths and window + self.recent < self.recent:
            start = max(window + self.recent, 0)
            count += cdiv(self.recent, block_kv) - start // block_kv
        end = min(first + block_q, self.length)
        return count + cdiv(end, block_kv) - max(window, 0) // block_kv


def _past(sinks, recents, lengths) -> Past:
    """Build a Past of descriptions, which a type checker of its fields would refuse."""
    example = Past(**dict.fromkeys(_FIELDS, jnp.zeros((1, 1, 1, 1))), lengths=jnp.zeros(1, int))
    leaves = [sinks, sinks, recents, recents, lengths]
    return jax.tree.unflatten(jax.tree.structure(example), leaves)


_FIELDS = ("sink_keys", "sink_values", "recent_keys", "recent_values")
_TINY = {"sink": 4, "recent": 24, "q_heads": 4, "kv_heads": 2, "head_dim": 64}

CASES: dict[str, StreamingCase] = {
    "one token": StreamingCase(length=1, **_TINY),
    "three tokens": StreamingCase(length=3, **_TINY),
    "one token before the sinks' end": StreamingCase(length=3, lengths=(0, 1), **_TINY),
    "sink + recent": StreamingCase(length=28, **_TINY),
    "sink + recent + 1": StreamingCase(length=29, **_TINY),
    "odd length, rows of many pasts": StreamingCase(length=97, lengths=(0, 3, 27, 150), **_TINY),
    "a chunk shorter than the window": StreamingCase(length=7, lengths=(150, 12), **_TINY),
    "no sinks": StreamingCase(length=97, sink=0, recent=24, q_heads=4, kv_heads=2, head_dim=64),
    "group of 7, head_dim 80": StreamingCase(
        length=65, lengths=(40,), sink=4, recent=24, q_heads=7, kv_heads=1, head_dim=80
    ),
    "published sizes": StreamingCase(length=300, lengths=(1000, 130), q_heads=4, kv_heads=1),
    "float16": StreamingCase(length=140, lengths=(500,), q_heads=2, kv_heads=2, dtype="float16"),
    "float32": StreamingCase(length=140, lengths=(500,), q_heads=2, kv_heads=2, dtype="float32"),
    "head_dim 96": StreamingCase(length=70, q_heads=4, kv_heads=1, head_dim=96),
    "head_dim 256": StreamingCase(length=70, q_heads=4, kv_heads=1, head_dim=256),
    "gradient, three tokens": StreamingCase(length=3, gradient=True, **_TINY),
    "gradient, odd length": StreamingCase(length=97, batch=2, gradient=True, **_TINY),
    "gradient, no sinks": StreamingCase(
        length=97, sink=0, recent=24, q_heads=4, kv_heads=2, head_dim=64, gradient=True
    ),
    "gradient, group of 7, head_dim 80": StreamingCase(
        length=130, sink=20, recent=40, q_heads=7, kv_heads=1, head_dim=80, gradient=True
    ),
    "gradient, group of 1, float16": StreamingCase(
        length=200, sink=16, recent=64, q_heads=2, kv_heads=2, dtype="float16", gradient=True
    ),
    "gradient, float32": StreamingCase(
        length=200, sink=16, recent=64, q_heads=4, kv_heads=1, dtype="float32", gradient=True
    ),
    "gradient, head_dim 256": StreamingCase(
        length=70, sink=16, recent=32, q_heads=2, kv_heads=1, head_dim=256, gradient=True
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
