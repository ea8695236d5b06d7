"""Attention of one new token per row over cached keys and values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import online_softmax

# Measured on two CPU cores with 2 to 32 KV heads of 128 and 16,384 float32 tokens: all slots at
# once are read at 11 to 16 GB/s, by both cores; blocks of 256 to 4,096 tokens, each copied out of
# the cache first, at 6 to 10 GB/s, mostly by one.
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

    The order of slots does not matter, so this serves full caches and rings alike. A cache that is
    at least half full is read whole; of an emptier one, only blocks up to the longest row.

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
    lengths = lengths.astype(int)  # as jnp.arange
    grouped = q.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    longest = jnp.max(lengths)

    def add(state, k, v, first):
        positions = first + jnp.arange(k.shape[2])
        mask = (positions[None, :] < lengths[:, None])[:, None, None, :]
        mask = jnp.broadcast_to(mask, (batch, 1, grouped.shape[2], k.shape[2]))
        return online_softmax.add_block(state, grouped, k, v, mask, softmax_scale=softmax_scale)

    def whole(state):
        return add(state, k, v, 0)

    def in_blocks(state):
        def add_block(index, state):
            first = index * _BLOCK_KV
            block = [jax.lax.dynamic_slice_in_dim(x, first, _BLOCK_KV, axis=2) for x in (k, v)]
            return add(state, *block, first)

        # The last block ends within the slots, since less than half of them are filled.
        return jax.lax.fori_loop(0, (longest + _BLOCK_KV - 1) // _BLOCK_KV, add_block, state)

    state = online_softmax.start(grouped)
    if slots <= _BLOCK_KV:
        state = whole(state)
    else:
        state = jax.lax.cond(2 * longest >= slots, whole, in_blocks, state)
    out, lse = online_softmax.finish(state)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])
