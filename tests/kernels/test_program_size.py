"""The size of a program does not grow with the numbers of sinks, recent tokens and new tokens."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels import Past, streaming_attention
from tests.programs import operations


def count(length: int, *, sink: int, recent: int, cached: bool) -> int:
    """Count the operations of a chunk of 3 KV heads, and of its gradient if nothing is cached."""
    attend = functools.partial(
        streaming_attention,
        sink_size=sink,
        recent_size=recent,
        softmax_scale=0.25,
        implementation="xla",
    )

    def after(q, kv, sinks, recents, lengths):
        past = Past(
            sink_keys=sinks,
            sink_values=sinks,
            recent_keys=recents,
            recent_values=recents,
            lengths=lengths,
        )
        return attend(q, kv, kv, past=past)

    def gradient(q, k, v):
        return jax.grad(lambda *qkv: attend(*qkv)[0].sum(), argnums=(0, 1, 2))(q, k, v)

    chunk = jax.ShapeDtypeStruct((1, length, 3, 16), jnp.float32)
    if not cached:
        return len(list(operations(jax.make_jaxpr(gradient)(chunk, chunk, chunk).jaxpr)))
    past = (jax.ShapeDtypeStruct((1, 3, size, 16), jnp.float32) for size in (sink, recent))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return len(list(operations(jax.make_jaxpr(after)(chunk, chunk, *past, lengths).jaxpr)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cached", [True, False])
def test_streaming_attention(cached):
    # No length is a multiple of a block of queries: padding is an operation of its own.
    sizes = [(15, 4, 96), (15, 4, 4000), (300, 4, 96), (300, 200, 96), (8190, 64, 4000)]
    counts = [count(length, sink=s, recent=r, cached=cached) for length, s, r in sizes]
    assert counts == counts[:1] * len(sizes)
