"""How much the tokens of a full cache are looked at: the votes by which some are evicted.

A query's vote for a key is its attention weight, mean over the query heads of a KV head. Who votes:

    "latest"  the last 32 tokens that were read; their votes are added up (SnapKV, arXiv 2404.14469,
              section 4). A chunk of fewer makes the votes before it count less, so that a text gets
              about the same votes however its end is cut into chunks.
    "all"     every token of a chunk; the highest vote of any query head counts (KVzip, arXiv
              2505.23416, section 3.2), also over chunks

The log-sum-exp that attention returns turns scores into weights, so blocks of keys are looked at
one by one, and nothing as large as the cache is made.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.cache import LATEST, KVCache
from kernels import masks, packed, stripes

Voters = Literal["latest", "all"]

_KEYS = 1024  # looked at together
_QUERIES = 64


def count_votes(
    cache: KVCache,
    q: Float[Array, "batch length q_heads head_dim"],
    lse: Float[Array, "batch length q_heads"],
    *,
    kept: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    voters: Voters,
    shares: int = 1,
) -> KVCache:
    """Return the cache with the votes of a chunk that has been appended to it.

    Args:
      cache: full cache with votes; of several devices, what one holds.
      q: the chunk's queries, rotated.
      lse: log-sum-exp of their attention to the cache, to that of all devices.
      kept: tokens that were held before the chunk; of several devices, the chunk's first position,
        counted from that of the cache's first slot (kernels.stripes).
      num_tokens: tokens of the chunk that count, per row.
      voters: who votes.
      shares: devices that share the text.
    """
    assert cache.votes is not None
    before, length = cache.votes[..., 0], q.shape[1]
    place: dict[str, Any] = {"kept": kept, "num_tokens": num_tokens, "shares": shares}
    if voters == "latest":
        count = min(LATEST, length)
        at = num_tokens[:, None] - count + jnp.arange(count, dtype=num_tokens.dtype)[None, :]
        voted = _votes(cache, q, lse, at, **place, highest=False)
        old = 1 - jnp.minimum(num_tokens, LATEST).astype(before.dtype) / LATEST
        votes = old[:, None, None] * before + voted
    else:

        def raised(number, votes):
            at = number * _QUERIES + jnp.arange(_QUERIES, dtype=num_tokens.dtype)[None, :]
            at = jnp.broadcast_to(at, (q.shape[0], _QUERIES))
            voted = _votes(cache, q, lse, at, **place, highest=True)
            return jnp.maximum(votes, voted)

        votes = jax.lax.fori_loop(0, -(-length // _QUERIES), raised, before)
    return dataclasses.replace(cache, votes=votes[..., None])


def _votes(
    cache: KVCache,
    q: Float[Array, "batch length q_heads head_dim"],
    lse: Float[Array, "batch length q_heads"],
    at: Int[Array, "batch voters"],
    *,
    kept: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    shares: int,
    highest: bool,
) -> Float[Array, "batch kv_heads slots"]:
    """Return the votes of some of a chunk's tokens: their sum, or the highest of any query head."""
    batch, heads, slots, head_dim = cache.keys.shape
    counts = (at >= 0) & (at < num_tokens[:, None])
    chosen = jnp.clip(at, 0, q.shape[1] - 1)
    q = jnp.take_along_axis(q, chosen[:, :, None, None], axis=1)
    q = q.reshape(batch, -1, heads, q.shape[2] // heads, head_dim)
    lse = jnp.take_along_axis(lse, chosen[:, :, None], axis=1).astype(jnp.float32)
    lse = lse.reshape(*q.shape[:4])
    q_positions = kept[:, None] + at
    block = min(_KEYS, slots)

    def one_block(number, votes):
        first = jnp.minimum(number * block, slots - block)
        keys = packed.read_slots(cache.keys, first, block, q.dtype)
        scores = jnp.einsum("btkgh,bksh->btkgs", q, keys, preferred_element_type=jnp.float32)
        positions = stripes.position(first + jnp.arange(block, dtype=at.dtype), shares)
        visible = masks.causal_pairs(q_positions[..., None], positions[None, None, :])
        visible &= counts[..., None]
        exponent = scores * head_dim**-0.5 - lse[..., None]
        weights = jnp.exp(jnp.where(visible[:, :, None, None, :], exponent, -jnp.inf))
        new = weights.max(axis=(1, 3)) if highest else weights.mean(axis=3).sum(axis=1)
        return jax.lax.dynamic_update_slice_in_dim(votes, new, first, axis=2)

    none = jnp.zeros((batch, heads, slots), jnp.float32)
    return jax.lax.fori_loop(0, -(-slots // block), one_block, none)
