"""A loop over KV heads for attention that is written for one of them."""

import jax
import jax.numpy as jnp

# Scores of as many KV heads as fit in this many bytes are computed together.
_SCORE_BYTES = 2**25


def over_kv_heads(one_kv_head, q, k, v, *, head_major=(), scores_per_query: int):
    """Apply a function of one KV head and its query group to all of them, some at a time.

    `one_kv_head` takes q [batch, length, group, head_dim], k and v [batch, length, head_dim], then
    the slice of every tree in `head_major` (leading axis: KV heads). It returns arrays
    [batch, length, group, ...]; they come back as [batch, length, q_heads, ...].
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    bytes_per_head = batch * length * (num_q_heads // num_kv_heads) * scores_per_query * 4
    out = jax.lax.map(
        lambda heads: one_kv_head(*heads),
        (*(jnp.moveaxis(x, 2, 0) for x in (grouped, k, v)), *head_major),
        batch_size=max(1, min(num_kv_heads, _SCORE_BYTES // bytes_per_head)),
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length, num_q_heads, *x.shape[4:]), out
    )
