"""Causal attention of a chunk over packed keys and values, for the Triton lowering.

Work is shared out as in kernels.prefill.triton: program (i, n, b) owns block_q queries of query
head n in row b, the last block first. Tiles are small, since queries and sums of a row lie in
registers field by field; see kernels.packed.softmax. All tiles are masked, also those that all
queries of a block see: a second loop would double the code, and a mask is little beside unpacking.

Measured: not yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, masks, tiles
from kernels.packed import softmax
from kernels.packed.layout import Layout, Packed
from kernels.tiles import BlockSizes


def prefill(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Packed,
    v: Packed,
    offsets: Int[Array, " batch"],
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.prefill."""
    batch, length, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[1]
    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    out, lse = compat.pallas_call(
        functools.partial(
            _kernel,
            softmax_scale=softmax_scale,
            block_sizes=block_sizes,
            layouts=(k.layout, v.layout),
        ),
        name="duo_prefill_packed",
        grid=(tiles.cdiv(length, block_sizes.block_q), num_q_heads, batch),
        in_specs=[
            q_spec,
            *softmax.specs(k, lambda i, n, b: (b, n // group)),
            *softmax.specs(v, lambda i, n, b: (b, n // group)),
            pl.BlockSpec((None,), lambda i, n, b: (b,)),
        ],
        out_specs=[q_spec, pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, length), jnp.float32),
        ],
        num_warps=block_sizes.num_warps,
        num_stages=block_sizes.num_stages,
        interpret=interpret,
    )(q, *k.leaves, *v.leaves, offsets.astype(jnp.int32))
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    q_ref,  # [length, head_dim]
    key_words_ref,  # [word_slots, words]
    key_scales_ref,  # [scale_slots, scales]
    key_zeros_ref,  # [scale_slots, scales]
    value_words_ref,  # [word_slots, words]
    value_scales_ref,  # [scale_slots, scales]
    value_zeros_ref,  # [scale_slots, scales]
    offset_ref,  # []
    out_ref,  # [length, head_dim]
    lse_ref,  # [length]
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    layouts: tuple[Layout, Layout],
):
    keys = softmax.Operand(key_words_ref, key_scales_ref, key_zeros_ref, layouts[0])
    values = softmax.Operand(value_words_ref, value_scales_ref, value_zeros_ref, layouts[1])
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    length, slots = q_ref.shape[0], key_words_ref.shape[0] * layouts[0].tokens_per_word
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    rows = tiles.indices(block_q, first_row)
    first_position = offset_ref[...] + first_row
    q_positions = tiles.indices(block_q, first_position)
    queries = softmax.load_queries(q_ref, rows, end=length, layout=layouts[0])

    def visible(positions):
        return masks.causal(q_positions, positions) & (positions < slots)[None, :]

    def add_block(index, state):
        return softmax.add_block(
            index,
            state,
            queries,
            keys,
            values,
            visible,
            block_kv=block_kv,
            end=slots,
            softmax_scale=softmax_scale,
        )

    end = jnp.clip(first_position + block_q, 0, slots)
    state = softmax.start(queries, values=values)
    state = jax.lax.fori_loop(0, tiles.cdiv(end, block_kv), add_block, state)
    outs, lse = softmax.finish(state)
    softmax.store_output(out_ref, rows, outs, end=length)
    tiles.store_vector(lse_ref, rows, lse, end=length)
