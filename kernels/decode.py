"""Attention of one new token per row over cached keys and values."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import online_softmax

# Measured on two CPU cores at 8 and 32 KV heads of 128: blocks from 256 to 1,024 tokens stay in
# the cache between the two products; larger ones halve the speed.
_BLOCK_KV = 512


def decode(
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    lengths: Int[Array, " batch"],
    *,
    softmax_scale: float,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Attend with one query per row to the first `lengths[b]` slots of row b.

        out[b] = softmax(softmax_scale * q[b] K[b, :lengths[b]]^T) V[b, :lengths[b]]

    The order of slots does not matter, so this serves full caches and rings alike. Blocks of slots
    beyond the longest row are not read.

    Args:
      q: the rotated query of every row.
      k: cached keys, already rotated.
      v: cached values; finite in slots beyond `lengths` too, which count 0 times.
      lengths: filled slots per row, the new token's own included; a row of 0 gets output 0.
      softmax_scale: factor on the scores.

    Returns:
      The output in the dtype of `q`, and its lse (natural logarithm, float32), with which parts of
      a cache can be merged.
    """
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = k.shape[1], k.shape[2]
    block = min(_BLOCK_KV, slots)
    lengths = lengths.astype(int)  # as jnp.arange
    grouped = q.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)

    def add_block(index, state):
        first = index * block
        at = jnp.minimum(first, slots - block)  # the last block may reach back
        positions = at + jnp.arange(block)
        mask = (positions >= first)[None, :] & (positions[None, :] < lengths[:, None])
        return online_softmax.add_block(
            state,
            grouped,
            jax.lax.dynamic_slice_in_dim(k, at, block, axis=2),
            jax.lax.dynamic_slice_in_dim(v, at, block, axis=2),
            jnp.broadcast_to(mask[:, None, None, :], (batch, 1, grouped.shape[2], block)),
            softmax_scale=softmax_scale,
        )

    num_blocks = jnp.minimum((jnp.max(lengths) + block - 1) // block, math.ceil(slots / block))
    state = jax.lax.fori_loop(0, num_blocks, add_block, online_softmax.start(grouped))
    out, lse = online_softmax.finish(state)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])
