"""Decode attention through XLA: the reference, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import online_softmax
from kernels.packed import Packed
from kernels.pages import Pages, block_slots, num_slots, read_block
from kernels.tile_io import cdiv

# Measured on two CPU cores with 2 to 32 KV heads of 128 and 16,384 float32 tokens: all slots at
# once are read at 11 to 16 GB/s, by both cores; blocks of 256 to 4,096 tokens, each copied out of
# the cache first, at 6 to 10 GB/s, mostly by one.
_BLOCK_KV = 512


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    lengths: Int[Array, " batch"],
    pages: Pages | None = None,
    *,
    softmax_scale: float,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """See kernels.decode_attention.

    A cache that is at least half full is read whole; an emptier, packed or paged one in blocks, up
    to the longest row.
    """
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = k.shape[1], num_slots(k, pages)
    lengths = lengths.astype(int)  # as jnp.arange
    grouped = q.reshape(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    longest = jnp.max(lengths)

    def add(state, k, v, at, first):
        positions = at + jnp.arange(k.shape[2])
        mask = (positions >= first)[None, :] & (positions[None, :] < lengths[:, None])
        mask = mask[:, None, None, :]
        mask = jnp.broadcast_to(mask, (batch, 1, grouped.shape[2], k.shape[2]))
        return online_softmax.add_block(state, grouped, k, v, mask, softmax_scale=softmax_scale)

    def whole():
        return add(online_softmax.start(grouped), k, v, 0, 0)

    def in_blocks():
        block = block_slots(k, pages, _BLOCK_KV)

        def add_block(index, state):
            first = index * block
            at = jnp.minimum(first, slots - block)  # the last block may reach back
            keys, values = (read_block(x, pages, at, block, q.dtype) for x in (k, v))
            return add(state, keys, values, at, first)

        start = online_softmax.start(grouped)
        return jax.lax.fori_loop(0, cdiv(longest, block), add_block, start)

    # Short rings take the branch too, although it saves them little: where XLA sees the product
    # next to the cache's update, it wants the cache in another layout, and copies it.
    if isinstance(k, Packed) or pages is not None:
        state = in_blocks()
    else:
        state = jax.lax.cond(2 * longest >= slots, whole, in_blocks)
    out, lse = online_softmax.finish(state)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])
