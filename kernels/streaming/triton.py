"""Streaming attention of a chunk, for the Triton lowering.

Program (i, n, b) owns block_q queries of query head n in row b. It walks three kinds of key tiles:
the sinks, the cached recent tokens that its first query still sees, and the chunk's own tokens from
there to its diagonal; nothing else is loaded. Every tile is masked: with windows of a few hundred
tokens most of them are cut by an edge. Query, running maximum, sum and output stay in registers
(float32). Lengths are read at run time.

Measured: not yet.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import compat, masks, online_softmax, tiles
from kernels.no_gradient import refuse_gradient
from kernels.streaming import backward as backward_kernels
from kernels.streaming.config import Config
from kernels.streaming.past import Past, nothing
from kernels.tiles import BlockSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a call needs beside its arrays."""

    sink_size: int
    recent_size: int
    softmax_scale: float
    config: Config
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def whole_sequence(
    static: Static,
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend within a sequence from its first token on; differentiable once, in reverse mode."""
    return forward(
        q,
        k,
        v,
        nothing(k, v, sink_size=min(static.sink_size, k.shape[1])),
        sink_size=static.sink_size,
        recent_size=static.recent_size,
        softmax_scale=static.softmax_scale,
        block_sizes=static.config.forward,
        interpret=static.interpret,
    )


def _whole_sequence_forward(static: Static, q, k, v):
    out, lse = whole_sequence(static, q, k, v)
    return (out, lse), (q, k, v, out, lse)


def _whole_sequence_backward(static: Static, residuals, gradients):
    backward = functools.partial(
        backward_kernels.backward,
        sink_size=static.sink_size,
        recent_size=static.recent_size,
        softmax_scale=static.softmax_scale,
        block_sizes=static.config.backward,
        interpret=static.interpret,
        name="duo_streaming",
    )
    reason = (
        "the kernels of streaming_attention have no second derivatives; implementation='xla' has"
    )
    return refuse_gradient(backward, reason)(*residuals, gradients[0])


whole_sequence.defvjp(_whole_sequence_forward, _whole_sequence_backward)


def behind(
    past: Past,
    static: Static,
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend behind a past; not differentiable."""
    attend = functools.partial(
        forward,
        sink_size=static.sink_size,
        recent_size=static.recent_size,
        softmax_scale=static.softmax_scale,
        block_sizes=static.config.forward,
        interpret=static.interpret,
    )
    reason = (
        "the kernel of streaming_attention has no gradient behind a past; implementation='xla' has"
    )
    return refuse_gradient(attend, reason)(q, k, v, past)


def forward(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    past: Past,
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.streaming_attention."""
    batch, length, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[2]
    chunk_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    operands = [past.lengths.astype(jnp.int32), q, k, v]
    specs = [pl.BlockSpec((None,), lambda i, n, b: (b,)), q_spec, chunk_spec, chunk_spec]
    sinks, recents = past.sink_keys.shape[2], past.recent_keys.shape[2]
    for slots, pair in (
        (sinks, (past.sink_keys, past.sink_values)),
        (recents, (past.recent_keys, past.recent_values)),
    ):
        if slots:  # Pallas takes no empty arrays
            spec = pl.BlockSpec(
                (None, None, slots, head_dim), lambda i, n, b: (b, n // group, 0, 0)
            )
            operands += pair
            specs += [spec, spec]
    out, lse = compat.pallas_call(
        functools.partial(
            _kernel,
            sinks=sinks,
            recents=recents,
            sink_size=sink_size,
            recent_size=recent_size,
            softmax_scale=softmax_scale,
            block_sizes=block_sizes,
        ),
        name="duo_streaming",
        grid=(tiles.cdiv(length, block_sizes.block_q), num_q_heads, batch),
        in_specs=specs,
        out_specs=[q_spec, pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, length), jnp.float32),
        ],
        num_warps=block_sizes.num_warps,
        num_stages=block_sizes.num_stages,
        interpret=interpret,
    )(*operands)
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    past_length_ref,  # []
    q_ref,  # [length, head_dim]
    k_ref,  # [length, head_dim]
    v_ref,  # [length, head_dim]
    *refs,  # sink_k, sink_v: [sinks, head_dim]; recent_k, recent_v: [recents, head_dim]; out, lse
    sinks: int,
    recents: int,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    block_sizes: BlockSizes,
):
    *cached, out_ref, lse_ref = refs
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    length = q_ref.shape[0]
    first_row = pl.program_id(0) * block_q
    rows = tiles.indices(block_q, first_row)
    past_length = past_length_ref[...]
    q_positions = past_length + rows
    q = tiles.load(q_ref, rows, end=length)
    state = online_softmax.start(q)

    def walk(state, k_ref, v_ref, *, first, end, origin, window: bool):
        """See keys first .. end - 1 of a ref, whose key j has position origin + j."""

        def add_block(index, state):
            keys = tiles.indices(block_kv, index * block_kv)
            positions = origin + keys
            mask = masks.streaming(
                q_positions, positions, sink_size=sink_size, recent_size=recent_size
            )
            counted = keys < end
            if window:  # sinks are counted on their own, once
                counted &= positions >= sink_size
            k = tiles.load(k_ref, keys, end=end)
            v = tiles.load(v_ref, keys, end=end)
            return online_softmax.add_block(
                state, q, k, v, mask & counted[None, :], softmax_scale=softmax_scale
            )

        return jax.lax.fori_loop(first // block_kv, tiles.cdiv(end, block_kv), add_block, state)

    if sinks:
        end = jnp.minimum(past_length + first_row + block_q, sinks)
        state = walk(state, *cached[:2], first=0, end=end, origin=0, window=False)
    # The window of the block's first query begins here, counted from the chunk's first token.
    window_start = first_row - (recent_size - 1)
    if recents:
        first = jnp.maximum(window_start + recents, 0)
        end = recents * (first < recents).astype(jnp.int32)  # nothing to walk beyond the window
        origin = past_length - recents
        state = walk(state, *cached[-2:], first=first, end=end, origin=origin, window=True)
    state = walk(
        state,
        k_ref,
        v_ref,
        first=jnp.maximum(window_start, 0),
        end=jnp.minimum(first_row + block_q, length),
        origin=past_length,
        window=True,
    )
    out, lse = online_softmax.finish(state)
    tiles.store(out_ref, rows, out, end=length)
    tiles.store_vector(lse_ref, rows, lse, end=length)
