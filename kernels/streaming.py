"""Attention of streaming heads over whole sequences or chunks, through XLA.

Each token sees the sinks and a window of recent tokens, so only a band along the diagonal is ever
computed. Scores and softmax are float32 (float64 for float64 inputs). Query head i reads KV head
i // group.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import masks, online_softmax, pytree
from kernels.heads import over_kv_heads


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

    Queries are cut into blocks; all of them meet the sinks and, shift by shift, the few key blocks
    that their windows can reach. Differentiable, with O(length * (sink + recent)) work and memory
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
        past = _nothing_past(k, v, sink_size=sink_size)
    starts = past.lengths.astype(int)[:, None] + jnp.arange(num_blocks)[None, :] * block
    mask_of = functools.partial(masks.streaming, sink_size=sink_size, recent_size=recent_size)

    def of_all_blocks(one_block) -> Bool[Array, "#batch num_blocks rows kv_len"]:
        return jnp.repeat(jax.vmap(jax.vmap(one_block))(starts), group, axis=2)

    def window_mask(start, shift: int):
        positions = start + shift * block + jnp.arange(block)
        visible = mask_of(start + jnp.arange(block), positions)
        return visible & (positions >= sink_size)[None, :]  # sinks are counted on their own

    def sink_mask(start):
        return mask_of(start + jnp.arange(block), jnp.arange(sink_size))

    @jax.checkpoint
    def one_kv_head(q, k, v, sink_keys, sink_values, recent_keys, recent_values):
        q = _fit_length(q, after=num_blocks * block)
        q = q.reshape(batch, num_blocks, block * group, head_dim)
        k_blocks, v_blocks = (
            jnp.concatenate(
                [
                    _fit_length(earlier, before=lookback * block),
                    _fit_length(x, after=num_blocks * block),
                ],
                axis=1,
            ).reshape(batch, lookback + num_blocks, block, head_dim)
            for earlier, x in ((recent_keys, k), (recent_values, v))
        )
        state = online_softmax.start(q)
        for i in range(lookback + 1):
            state = online_softmax.add_block(
                state,
                q,
                k_blocks[:, i : i + num_blocks],
                v_blocks[:, i : i + num_blocks],
                of_all_blocks(functools.partial(window_mask, shift=i - lookback)),
                softmax_scale=softmax_scale,
            )
        if sink_size:
            # All blocks share the sinks, so their queries are the rows of one product.
            flat = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), (state, q))
            mask = of_all_blocks(sink_mask)
            state = online_softmax.add_block(
                *flat,
                sink_keys,
                sink_values,
                mask.reshape(mask.shape[0], -1, sink_size),
                softmax_scale=softmax_scale,
            )
        out, _ = online_softmax.finish(state)
        out = out.reshape(batch, num_blocks * block, group, head_dim)
        return out[:, :length].astype(q.dtype)

    cached = (past.sink_keys, past.sink_values, past.recent_keys, past.recent_values)
    return over_kv_heads(
        one_kv_head,
        q,
        k,
        v,
        head_major=[jnp.moveaxis(x, 1, 0) for x in cached],
        scores_per_query=sink_size + (lookback + 1) * block,
    )


def _nothing_past(k, v, *, sink_size: int) -> Past:
    """Return the past of a chunk that begins its sequence: only its own sinks."""
    sink_keys, sink_values = (jnp.moveaxis(x[:, :sink_size], 2, 1) for x in (k, v))
    nothing = jnp.zeros((*sink_keys.shape[:2], 0, k.shape[3]), k.dtype)
    return Past(
        sink_keys=sink_keys,
        sink_values=sink_values,
        recent_keys=nothing,
        recent_values=nothing,
        lengths=jnp.zeros(k.shape[0], jnp.int32),
    )


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
