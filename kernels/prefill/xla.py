"""Prefill attention through XLA: the reference, and what runs where there is no kernel."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import masks, online_softmax, stripes
from kernels.packed import Packed
from kernels.pages import Pages, block_slots, num_slots, read_block
from kernels.tile_io import cdiv

_BLOCK_KV = 512
# The most bytes that the scores of one block of queries and one block of keys take, over all rows
# of a batch. KV heads follow each other: a product of all of them has few rows in each, and on two
# cores of an Intel Xeon took 2.5 times as long with 32 KV heads (5.8 times with four rows), 1.2 to
# 1.4 times with 3 and 8. There, 4 MB were fastest or near it in seven cases, 1 MB took up to 55%
# longer, 8 MB up to 33%.
_SCORE_BYTES = 2**22


def prefill_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    starts: Int[Array, " batch"],
    pages: Pages | None = None,
    *,
    shares: int = 1,
    softmax_scale: float,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.prefill_attention."""
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = k.shape[1], num_slots(k, pages)
    group = num_q_heads // num_kv_heads
    starts = starts.astype(int)  # as jnp.arange
    block_kv = block_slots(k, pages, _BLOCK_KV)
    block_q = _SCORE_BYTES // (4 * batch * group * block_kv)
    block_q = min(length, max(16, 1 << (max(block_q, 1).bit_length() - 1)))
    num_q_blocks = math.ceil(length / block_q)

    # [kv_heads * q_blocks, batch, 1, block_q * group, head_dim]: the rows of one matrix product.
    padded = jnp.pad(q, ((0, 0), (0, num_q_blocks * block_q - length), (0, 0), (0, 0)))
    blocks = padded.reshape(batch, num_q_blocks, block_q, num_kv_heads, group, head_dim)
    blocks = blocks.transpose(3, 1, 0, 2, 4, 5)
    blocks = blocks.reshape(-1, batch, 1, block_q * group, head_dim)

    def one_block(place_and_q):
        place, q = place_and_q
        head, index = place // num_q_blocks, place % num_q_blocks
        q_positions = starts[:, None] + index * block_q + jnp.arange(block_q)[None, :]

        def add(at, mask, state):
            keys, values = (read_block(x, pages, at, block_kv, q.dtype, head=head) for x in (k, v))
            return online_softmax.add_block(
                state, q, keys, values, mask, softmax_scale=softmax_scale
            )

        def add_seen(kv_index, state):
            return add(kv_index * block_kv, None, state)

        def add_masked(kv_index, state):
            first = kv_index * block_kv
            at = jnp.minimum(first, slots - block_kv)  # the last block may reach back
            in_block = at + jnp.arange(block_kv)
            positions = stripes.position(in_block, shares)
            mask = jax.vmap(masks.causal, (0, None))(q_positions, positions)
            mask = mask & (in_block >= first)[None, None, :]
            return add(at, jnp.repeat(mask, group, axis=1)[:, None], state)

        # Every query of the block sees the first key blocks whole; XLA writes down what it masks.
        filled = functools.partial(stripes.filled, shares=shares, slots=slots)
        seen = filled(jnp.min(q_positions) + 1) // block_kv
        end = cdiv(filled(jnp.max(q_positions) + 1), block_kv)
        state = jax.lax.fori_loop(0, seen, add_seen, online_softmax.start(q))
        state = jax.lax.fori_loop(seen, end, add_masked, state)
        out, lse = online_softmax.finish(state)
        return out.astype(q.dtype), lse

    def put_together(x):  # x: [kv_heads * q_blocks, batch, 1, block_q * group, ...]
        x = x.reshape(num_kv_heads, num_q_blocks, batch, block_q, group, *x.shape[4:])
        x = jnp.moveaxis(x, (2, 1, 3), (0, 1, 2))
        return x.reshape(batch, num_q_blocks * block_q, num_q_heads, *x.shape[5:])[:, :length]

    out, lse = jax.lax.map(one_block, (jnp.arange(blocks.shape[0]), blocks))
    return put_together(out), put_together(lse)
