"""Streaming attention through XLA: the reference, and what runs where there is no kernel.

Queries are cut into blocks; all of them meet the sinks and, shift by shift, the few key blocks that
their windows can reach, so only a band along the diagonal is ever computed. The shifts are a loop:
unrolled, a window of 2,000 tokens compiled for minutes. Scores and softmax are float32 (float64 for
float64 inputs). As many KV heads at a time as fit into a fixed score buffer.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import masks, online_softmax
from kernels.heads import over_kv_heads
from kernels.streaming.past import Past, nothing
from kernels.tile_io import power_of_two


def streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    past: Past | None = None,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.streaming_attention."""
    batch, length, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[2]
    block = min(128, max(16, power_of_two(recent_size)), max(16, power_of_two(length)))
    num_blocks = math.ceil(length / block)
    lookback = math.ceil((recent_size - 1) / block)
    if past is None:
        lookback = min(lookback, num_blocks - 1)
        sink_size = min(sink_size, length)
        past = nothing(k, v, sink_size=sink_size)
    # A single block of queries meets its whole window at once; windows of several would overlap.
    shifts, width = (1, (lookback + 1) * block) if num_blocks == 1 else (lookback + 1, block)
    starts = past.lengths.astype(int)[:, None] + jnp.arange(num_blocks)[None, :] * block
    mask_of = functools.partial(masks.streaming, sink_size=sink_size, recent_size=recent_size)

    def of_all_blocks(one_block) -> Bool[Array, "#batch num_blocks rows kv_len"]:
        return jnp.repeat(jax.vmap(jax.vmap(one_block))(starts), group, axis=2)

    def window_mask(start, shift: Int[Array, ""]):
        positions = start + shift * width - lookback * block + jnp.arange(width)
        visible = mask_of(start + jnp.arange(block), positions)
        return visible & (positions >= sink_size)[None, :]  # sinks are counted on their own

    def sink_mask(start):
        return mask_of(start + jnp.arange(block), jnp.arange(sink_size))

    @jax.checkpoint
    def one_kv_head(q, k, v, sink_keys, sink_values, recent_keys, recent_values):
        q = _fit_length(q, after=num_blocks * block)
        q = q.reshape(batch, num_blocks, block * group, head_dim)
        keys, values = (
            jnp.concatenate(
                [
                    _fit_length(earlier, before=lookback * block),
                    _fit_length(x, after=num_blocks * block),
                ],
                axis=1,
            )
            for earlier, x in ((recent_keys, k), (recent_values, v))
        )

        def add_shift(shift, state):
            k_blocks, v_blocks = (
                jax.lax.dynamic_slice_in_dim(x, shift * width, num_blocks * width, axis=1).reshape(
                    batch, num_blocks, width, head_dim
                )
                for x in (keys, values)
            )
            mask = of_all_blocks(functools.partial(window_mask, shift=shift))
            return online_softmax.add_block(
                state, q, k_blocks, v_blocks, mask, softmax_scale=softmax_scale
            )

        state = jax.lax.fori_loop(0, shifts, add_shift, online_softmax.start(q))
        if sink_size:
            # All blocks share the sinks, so their queries are the rows of one product.
            flat_state, flat_q = jax.tree.map(
                lambda x: x.reshape(batch, -1, *x.shape[3:]), (state, q)
            )
            mask = of_all_blocks(sink_mask)
            state = online_softmax.add_block(
                flat_state,
                flat_q,
                sink_keys,
                sink_values,
                mask.reshape(mask.shape[0], -1, sink_size),
                softmax_scale=softmax_scale,
            )
        out, lse = online_softmax.finish(state)
        out = out.astype(q.dtype).reshape(batch, num_blocks * block, group, head_dim)
        lse = jax.lax.stop_gradient(lse).reshape(batch, num_blocks * block, group)
        return out[:, :length], lse[:, :length]

    cached = (past.sink_keys, past.sink_values, past.recent_keys, past.recent_values)
    return over_kv_heads(
        one_kv_head,
        q,
        k,
        v,
        head_major=[jnp.moveaxis(x, 1, 0) for x in cached],
        scores_per_query=sink_size + (lookback + 1) * block,
    )


def _fit_length(
    x: Float[Array, "batch length ..."], *, before: int | None = None, after: int | None = None
) -> Float[Array, "batch fitted ..."]:
    """Bring axis 1 to a length: cut or pad with zeros at its start, or pad at its end."""
    if before is not None:
        x = x[:, max(0, x.shape[1] - before) :]
        pad = (before - x.shape[1], 0)
    else:
        assert after is not None
        pad = (0, after - x.shape[1])
    return jnp.pad(x, [(0, 0), pad] + [(0, 0)] * (x.ndim - 2))
