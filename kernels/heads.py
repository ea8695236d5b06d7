"""A loop over KV heads for attention that is written for one of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The scores of as many KV heads as fit into this many bytes are computed together.
_SCORE_BYTES = 2**25


def over_kv_heads(
    one_kv_head: Callable[..., Any],
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    head_major: Sequence[Any] = (),
    scores_per_query: int,
) -> Any:
    """Apply a function of one KV head and its query group to all of them, some at a time.

    Args:
      one_kv_head: takes q [batch, length, group, head_dim], k and v [batch, length, head_dim], then
        one head's slice of every tree in `head_major`; returns a tree of arrays
        [batch, length, group, ...].
      q: queries.
      k: keys.
      v: values.
      head_major: more trees of arrays, whose leading axis is kv_heads.
      scores_per_query: keys that a query meets at once.

    Returns:
      The tree of `one_kv_head`, with arrays [batch, length, q_heads, ...].
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    bytes_per_head = batch * length * (num_q_heads // num_kv_heads) * scores_per_query * 4
    # A number that divides the heads: a remainder would have a program of its own.
    at_once = max(
        n
        for n in range(1, num_kv_heads + 1)
        if num_kv_heads % n == 0 and (n == 1 or n * bytes_per_head <= _SCORE_BYTES)
    )
    out = jax.lax.map(
        lambda heads: one_kv_head(*heads),
        (*(jnp.moveaxis(x, 2, 0) for x in (grouped, k, v)), *head_major),
        batch_size=at_once,
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length, num_q_heads, *x.shape[4:]), out
    )
