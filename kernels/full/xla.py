"""Full attention through XLA: the reference, and what runs where there is no kernel.

Queries go in blocks, so the half above the diagonal is never multiplied. Scores and softmax are
float32 (float64 for float64 inputs). The backward pass recomputes one block's scores at a time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import masks
from kernels.heads import over_kv_heads
from kernels.precision import accumulator

# Causal blocks are unrolled, so their number bounds the program's size; 16 blocks already
# compute only 17/32 of the square.
_MIN_CAUSAL_BLOCK = 128
_MAX_CAUSAL_BLOCKS = 16


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
) -> Float[Array, "batch length q_heads head_dim"]:
    """See kernels.full_attention."""
    length = q.shape[1]
    block = max(_MIN_CAUSAL_BLOCK, math.ceil(length / _MAX_CAUSAL_BLOCKS))

    @functools.partial(jax.checkpoint, static_argnums=3)
    def attend_block(q, k, v, start):
        mask = jnp.asarray(masks.causal(jnp.arange(start, k.shape[1]), jnp.arange(k.shape[1])))
        return _attend(q[:, start:], k, v, mask, softmax_scale=softmax_scale)

    def one_kv_head(q, k, v):
        blocks = [
            attend_block(*(x[:, : start + block] for x in (q, k, v)), start)
            for start in range(0, length, block)
        ]
        return jnp.concatenate(blocks, axis=1)

    # One block of queries at a time meets at most all keys.
    return over_kv_heads(one_kv_head, q, k, v, scores_per_query=block)


def _attend(
    q: Float[Array, "batch q_len group head_dim"],
    k: Float[Array, "batch kv_len head_dim"],
    v: Float[Array, "batch kv_len head_dim"],
    mask: Bool[Array, "q_len kv_len"],
    *,
    softmax_scale: float,
) -> Float[Array, "batch q_len group head_dim"]:
    """Attend one block of queries of one KV head's group to some keys under a mask."""
    wide = accumulator(q.dtype)
    # dot_general keeps (q_len, group) together as rows of one matrix product; no transposes.
    scores = jax.lax.dot_general(q, k, (((3,), (2,)), ((0,), (0,))), preferred_element_type=wide)
    scores = jnp.where(mask[None, :, None, :], scores * softmax_scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((3,), (1,)), ((0,), (0,))), preferred_element_type=wide)
    return out.astype(q.dtype)
