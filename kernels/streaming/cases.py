"""Named cases of streaming attention: chunks behind a past, and gradients of whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.case import Case, Cost, per_row
from kernels.gpu import Gpu
from kernels.streaming.api import streaming_attention
from kernels.streaming.config import Config, heuristic
from kernels.streaming.past import Past
from kernels.streaming.schedule import Schedule, Work
from kernels.tiles import BlockSizes


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

    def block_sizes(self, *, gpu: Gpu) -> Config:
        return heuristic(length=self.length, head_dim=self.head_dim, dtype=self.dtype, gpu=gpu)

    def cost(self, *, gpu: Gpu) -> Cost:
        sizes = self.block_sizes(gpu=gpu)
        rows = self.lengths or (0,) * self.batch
        schedule = schedule_of(self, length=self.length, sink=self.sink, recent=self.recent)
        pairs, keys, work = 0, 0, Work()
        for past in rows:
            positions = past + np.arange(self.length)
            pairs += int(np.minimum(positions + 1, self.sink + self.recent).sum())
            # The chunk's own tokens, the recents of its first query, and the sinks before them.
            keys += self.length + min(past, self.recent - 1 + self.sink)
            work += schedule.forward(sizes.forward, past=past if self.lengths else None)
        queries = len(rows) * self.length * self.q_heads
        cost = Cost(
            flops=4.0 * pairs * self.q_heads * self.head_dim,
            num_bytes=queries * (2 * self.vector_bytes + 4) + keys * self.kv_heads * self.kv_bytes,
            scheduled_flops=float(work.flops),
            scheduled_bytes=float(work.num_bytes),
        )
        if not self.gradient:
            return cost
        return with_gradient(cost, schedule, sizes.backward, batch=self.batch)


def schedule_of(case: Case, *, length: int, sink: int, recent: int) -> Schedule:
    """Return what the streaming kernels do with the heads and dtype of a case."""
    return Schedule(
        length=length,
        sink=sink,
        recent=recent,
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        itemsize=case.itemsize,
    )


def with_gradient(forward: Cost, schedule: Schedule, sizes: BlockSizes, *, batch: int) -> Cost:
    """Return the cost of both directions over whole sequences.

    Five products instead of two. The backward pass reads what the forward pass read and wrote, and
    the output's gradient, and writes those of q, k and v.
    """
    vectors = batch * schedule.length * 2 * (schedule.q_heads + schedule.kv_heads)
    work = schedule.backward(sizes) * batch
    return Cost(
        flops=3.5 * forward.flops,
        num_bytes=2 * forward.num_bytes + vectors * schedule.vector_bytes,
        scheduled_flops=forward.scheduled_flops + work.flops,
        scheduled_bytes=forward.scheduled_bytes + work.num_bytes,
    )


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
    "gradient, group of 1, head_dim 96": StreamingCase(
        length=201, sink=16, recent=64, q_heads=2, kv_heads=2, head_dim=96, gradient=True
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
