"""Softmax attention of grouped query heads over their KV heads, through XLA.

`full_attention` serves retrieval heads, `streaming_attention` streaming heads. Both compute

    out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s] + mask[t, s]) v[s]

for every token of a sequence at once, and differ only in which keys they touch: full attention
walks causal blocks and never multiplies the half above the diagonal, streaming attention touches
the sinks and a band along the diagonal, so its cost grows with the length, not with its square.
Scores and softmax are float32 (float64 for float64 inputs). Query head i reads KV head i // group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import masks
from kernels.precision import accumulator

# Causal blocks are unrolled, so their number bounds the program's size; 16 blocks already
# compute only 17/32 of the square.
_MIN_CAUSAL_BLOCK = 128
_MAX_CAUSAL_BLOCKS = 16
# Scores of as many KV heads as fit in this many bytes are computed together.
_SCORE_BYTES = 2**28


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
) -> Float[Array, "batch length q_heads head_dim"]:
    """Attend causally: token i sees tokens 0..i.

    Differentiable; the backward pass recomputes one block's scores at a time.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      softmax_scale: factor on the scores, usually head_dim ** -0.5.

    Returns:
      The output in the dtype of `q`.
    """
    length = q.shape[1]
    block = max(_MIN_CAUSAL_BLOCK, math.ceil(length / _MAX_CAUSAL_BLOCKS))

    @functools.partial(jax.checkpoint, static_argnums=3)
    def attend_block(q, k, v, start):
        mask = masks.causal(jnp.arange(start, k.shape[1]), jnp.arange(k.shape[1]))
        return _attend(q[:, start:], k, v, mask, softmax_scale=softmax_scale)

    def one_kv_head(q, k, v):
        blocks = [
            attend_block(*(x[:, : start + block] for x in (q, k, v)), start)
            for start in range(0, length, block)
        ]
        return jnp.concatenate(blocks, axis=1)

    # One block of queries at a time meets at most all keys.
    return _over_kv_heads(one_kv_head, q, k, v, scores_per_query=block)


def streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
) -> Float[Array, "batch length q_heads head_dim"]:
    """Attend with the streaming mask: token i sees the sinks and its `recent_size` latest tokens.

    Queries are cut into blocks; each block is scored against the sinks and against the few key
    blocks its window can reach. Differentiable, with O(length * (sink + recent)) work and memory
    in both directions; as many KV heads at a time as fit into a fixed score buffer.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      sink_size: first tokens of the sequence every query sees; 0 or more.
      recent_size: latest tokens a query sees, its own included; at least 1.
      softmax_scale: factor on the scores.

    Returns:
      The output in the dtype of `q`.
    """
    if sink_size < 0 or recent_size < 1:
        raise ValueError(f"{sink_size=} must be at least 0 and {recent_size=} at least 1")
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_q_heads // num_kv_heads
    block = min(128, max(16, 1 << (recent_size - 1).bit_length()))
    num_blocks = math.ceil(length / block)
    lookback = min(math.ceil((recent_size - 1) / block), num_blocks - 1)
    sink_size = min(sink_size, length)

    band_size = sink_size + (lookback + 1) * block

    @jax.checkpoint
    def one_kv_head(q, k, v):
        q = _pad_length(q, 0, num_blocks * block - length)
        q = q.reshape(batch, num_blocks, block, group, head_dim)
        k_band, v_band = (
            _bands(x[:, :sink_size], x, lookback=lookback, block=block, num_blocks=num_blocks)
            for x in (k, v)
        )  # [batch, num_blocks, band_size, head_dim]
        mask = jax.vmap(
            functools.partial(
                _band_mask,
                block=block,
                lookback=lookback,
                sink_size=sink_size,
                recent_size=recent_size,
            )
        )(jnp.arange(num_blocks) * block)
        attend = functools.partial(_attend, softmax_scale=softmax_scale)
        out = jax.vmap(attend, (1, 1, 1, 0), 1)(q, k_band, v_band, mask)
        return out.reshape(batch, num_blocks * block, group, head_dim)[:, :length]

    return _over_kv_heads(one_kv_head, q, k, v, scores_per_query=band_size)


def _over_kv_heads(one_kv_head, q, k, v, *, scores_per_query: int):
    """Apply a function of one KV head and its query group to all of them, some at a time.

    `one_kv_head` takes q [batch, length, group, head_dim], k and v [batch, length, head_dim].
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    bytes_per_head = batch * length * (num_q_heads // num_kv_heads) * scores_per_query * 4
    out = jax.lax.map(
        lambda heads: one_kv_head(*heads),
        tuple(jnp.moveaxis(x, 2, 0) for x in (grouped, k, v)),
        batch_size=max(1, min(num_kv_heads, _SCORE_BYTES // bytes_per_head)),
    )
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)


def _attend(
    q: Float[Array, "batch q_len group head_dim"],
    k: Float[Array, "batch kv_len head_dim"],
    v: Float[Array, "batch kv_len head_dim"],
    mask: Bool[Array, "q_len kv_len"],
    *,
    softmax_scale: float,
) -> Float[Array, "batch q_len group head_dim"]:
    """Attend one block of queries of one KV head's group to some keys under one mask."""
    wide = accumulator(q.dtype)
    # dot_general keeps (q_len, group) together as rows of one matrix product; no transposes.
    scores = jax.lax.dot_general(q, k, (((3,), (2,)), ((0,), (0,))), preferred_element_type=wide)
    scores = jnp.where(mask[None, :, None, :], scores * softmax_scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((3,), (1,)), ((0,), (0,))), preferred_element_type=wide)
    return out.astype(q.dtype)


def _pad_length(x, before: int, after: int):
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _bands(sinks, x, *, lookback: int, block: int, num_blocks: int):
    """Lay out, for each query block, the sinks, then the key blocks its window can reach."""
    batch, length, head_dim = x.shape
    padded = _pad_length(x, lookback * block, num_blocks * block - length)
    blocks = padded.reshape(batch, lookback + num_blocks, block, head_dim)
    reachable = [blocks[:, i : i + num_blocks] for i in range(lookback + 1)]
    sinks = jnp.broadcast_to(sinks[:, None], (batch, num_blocks, *sinks.shape[1:]))
    return jnp.concatenate([sinks, *reachable], axis=2)


def _band_mask(start, *, block: int, lookback: int, sink_size: int, recent_size: int):
    """Return the mask of one query block over its band; a sink inside the window counts once."""
    window = start - lookback * block + jnp.arange((lookback + 1) * block)
    positions = jnp.concatenate([jnp.arange(sink_size), window])
    in_band = jnp.concatenate([jnp.ones(sink_size, bool), window >= sink_size])
    visible = masks.streaming(
        start + jnp.arange(block), positions, sink_size=sink_size, recent_size=recent_size
    )
    return visible & in_band[None, :]
