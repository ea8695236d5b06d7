"""Softmax attention of grouped query heads over their KV heads, through XLA.

`full_attention` serves retrieval heads, `streaming_attention` streaming heads. Both compute

    out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s] + mask[t, s]) v[s]

for every token of a sequence at once, and differ only in which keys they touch: full attention
walks causal blocks and never multiplies the half above the diagonal, streaming attention touches
the sinks and a band along the diagonal, so its cost grows with the length, not with its square.
Scores and softmax are float32 (float64 for float64 inputs). Query head i reads KV head i // group.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import masks, pytree
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
        return _attend(q[:, start:], k, v, mask[None], softmax_scale=softmax_scale)

    def one_kv_head(q, k, v):
        blocks = [
            attend_block(*(x[:, : start + block] for x in (q, k, v)), start)
            for start in range(0, length, block)
        ]
        return jnp.concatenate(blocks, axis=1)

    # One block of queries at a time meets at most all keys.
    return _over_kv_heads(one_kv_head, q, k, v, scores_per_query=block)


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """What a chunk's streaming heads still hold of the tokens before it, in order of position."""

    sink_keys: Float[Array, "batch kv_heads sink head_dim"]  # position = index; may be unfilled
    sink_values: Float[Array, "batch kv_heads sink head_dim"]
    recent_keys: Float[Array, "batch kv_heads recent head_dim"]  # the last is just before the chunk
    recent_values: Float[Array, "batch kv_heads recent head_dim"]  # finite where unfilled too
    lengths: Int[Array, " batch"]  # tokens before the chunk


def streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    past: Past | None = None,
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
      past: what came before the chunk; its sinks must hold those of the chunk's own tokens that
        are sinks. Default: the chunk begins the sequence.

    Returns:
      The output in the dtype of `q`.
    """
    if sink_size < 0 or recent_size < 1:
        raise ValueError(f"{sink_size=} must be at least 0 and {recent_size=} at least 1")
    batch, length, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[2]
    block = min(128, max(16, _power_of_two(recent_size)), max(16, _power_of_two(length)))
    num_blocks = math.ceil(length / block)
    lookback = math.ceil((recent_size - 1) / block)
    if past is None:
        lookback = min(lookback, num_blocks - 1)
        sink_size = min(sink_size, length)
        sinks = tuple(jnp.moveaxis(x[:, :sink_size], 2, 0) for x in (k, v))
        nothing = jnp.zeros((k.shape[2], batch, 0, head_dim), k.dtype)
        earlier, offsets = (nothing, nothing), jnp.zeros(1, int)
    else:
        sinks, earlier = (
            tuple(jnp.moveaxis(x, 1, 0) for x in pair)
            for pair in (
                (past.sink_keys, past.sink_values),
                (past.recent_keys, past.recent_values),
            )
        )
        offsets = past.lengths.astype(int)
    starts = offsets[:, None] + jnp.arange(num_blocks)[None, :] * block
    make_mask = functools.partial(
        _band_mask,
        block=block,
        lookback=lookback,
        sink_size=sink_size,
        recent_size=recent_size,
    )
    band_size = sink_size + (lookback + 1) * block

    @jax.checkpoint
    def one_kv_head(q, k, v, sinks, earlier):
        q = _fit_length(q, after=num_blocks * block)
        q = q.reshape(batch * num_blocks, block, group, head_dim)
        k_band, v_band = (
            _bands(*parts, lookback=lookback, block=block, num_blocks=num_blocks)
            for parts in zip(sinks, earlier, (k, v), strict=True)
        )
        mask = jax.vmap(jax.vmap(make_mask))(starts)
        mask = jnp.broadcast_to(mask, (batch, num_blocks, block, band_size))
        mask = mask.reshape(batch * num_blocks, block, band_size)
        out = _attend(q, k_band, v_band, mask, softmax_scale=softmax_scale)
        return out.reshape(batch, num_blocks * block, group, head_dim)[:, :length]

    return _over_kv_heads(
        one_kv_head, q, k, v, head_major=(sinks, earlier), scores_per_query=band_size
    )


def _over_kv_heads(one_kv_head, q, k, v, *, head_major=(), scores_per_query: int):
    """Apply a function of one KV head and its query group to all of them, some at a time.

    `one_kv_head` takes q [batch, length, group, head_dim], k and v [batch, length, head_dim], then
    the slice of every tree in `head_major` (leading axis: KV heads).
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
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)


def _attend(
    q: Float[Array, "batch q_len group head_dim"],
    k: Float[Array, "batch kv_len head_dim"],
    v: Float[Array, "batch kv_len head_dim"],
    mask: Bool[Array, "#batch q_len kv_len"],
    *,
    softmax_scale: float,
) -> Float[Array, "batch q_len group head_dim"]:
    """Attend one block of queries of one KV head's group to some keys under a mask."""
    wide = accumulator(q.dtype)
    # dot_general keeps (q_len, group) together as rows of one matrix product; no transposes.
    scores = jax.lax.dot_general(q, k, (((3,), (2,)), ((0,), (0,))), preferred_element_type=wide)
    scores = jnp.where(mask[:, :, None, :], scores * softmax_scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jax.lax.dot_general(weights, v, (((3,), (1,)), ((0,), (0,))), preferred_element_type=wide)
    return out.astype(q.dtype)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _fit_length(x, *, before: int | None = None, after: int | None = None):
    """Bring axis 1 to a length by cutting or padding with zeros, at its start or at its end."""
    if before is not None:
        x = x[:, max(0, x.shape[1] - before) :]
        pad = (before - x.shape[1], 0)
    else:
        pad = (0, after - x.shape[1])
    return jnp.pad(x, [(0, 0), pad] + [(0, 0)] * (x.ndim - 2))


def _bands(sinks, earlier, x, *, lookback: int, block: int, num_blocks: int):
    """Lay out, for each query block, the sinks, then the key blocks its window can reach.

    Takes [batch, tokens, head_dim], returns [batch * num_blocks, band_size, head_dim].
    """
    batch, _, head_dim = x.shape
    before = _fit_length(earlier, before=lookback * block)
    padded = jnp.concatenate([before, _fit_length(x, after=num_blocks * block)], axis=1)
    blocks = padded.reshape(batch, lookback + num_blocks, block, head_dim)
    reachable = [blocks[:, i : i + num_blocks] for i in range(lookback + 1)]
    sinks = jnp.broadcast_to(sinks[:, None], (batch, num_blocks, *sinks.shape[1:]))
    band = jnp.concatenate([sinks, *reachable], axis=2)
    return band.reshape(batch * num_blocks, -1, head_dim)


def _band_mask(start, *, block: int, lookback: int, sink_size: int, recent_size: int):
    """Return the mask of one query block over its band; a sink inside the window counts once."""
    window = start - lookback * block + jnp.arange((lookback + 1) * block)
    positions = jnp.concatenate([jnp.arange(sink_size), window])
    in_band = jnp.concatenate([jnp.ones(sink_size, bool), window >= sink_size])
    visible = masks.streaming(
        start + jnp.arange(block), positions, sink_size=sink_size, recent_size=recent_size
    )
    return visible & in_band[None, :]
