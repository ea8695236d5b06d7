"""Decode attention over packed keys and values, for the Triton lowering.

Work is shared out as in kernels.decode.triton: program (s, k, b) owns split s of the cache of KV
head k in row b, for the whole group of query heads that reads it. Queries and sums stay in
registers, a tile per field of a word; see kernels.packed.softmax.

Measured: not yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, tiles
from kernels.decode.config import BlockSizes
from kernels.merge import merge_lse
from kernels.packed import softmax
from kernels.packed.layout import Layout, Packed


def decode(
    q: Float[Array, "batch q_heads head_dim"],
    k: Packed,
    v: Packed,
    lengths: Int[Array, " batch"],
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """See kernels.decode."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    num_splits = block_sizes.num_splits
    out, lse = compat.pallas_call(
        functools.partial(
            _kernel,
            softmax_scale=softmax_scale,
            block_sizes=block_sizes,
            layouts=(k.layout, v.layout),
        ),
        name="duo_decode_packed",
        grid=(num_splits, num_kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda s, k, b: (b, k, 0, 0)),
            *softmax.specs(k, lambda s, k, b: (b, k)),
            *softmax.specs(v, lambda s, k, b: (b, k)),
            pl.BlockSpec((None,), lambda s, k, b: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, group, head_dim), lambda s, k, b: (s, b, k, 0, 0)),
            pl.BlockSpec((None, None, None, group), lambda s, k, b: (s, b, k, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_splits, batch, num_kv_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_splits, batch, num_kv_heads, group), jnp.float32),
        ],
        num_warps=block_sizes.num_warps,
        num_stages=block_sizes.num_stages,
        interpret=interpret,
    )(
        q.reshape(batch, num_kv_heads, group, head_dim),
        *k.leaves,
        *v.leaves,
        lengths.astype(jnp.int32),
    )
    out, lse = merge_lse(out, lse)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])


def _kernel(
    q_ref,  # [group, head_dim]
    key_words_ref,  # [word_slots, words]
    key_scales_ref,  # [scale_slots, scales]
    key_zeros_ref,  # [scale_slots, scales]
    value_words_ref,  # [word_slots, words]
    value_scales_ref,  # [scale_slots, scales]
    value_zeros_ref,  # [scale_slots, scales]
    length_ref,  # []
    out_ref,  # [group, head_dim]
    lse_ref,  # [group]
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    layouts: tuple[Layout, Layout],
):
    keys = softmax.Operand(key_words_ref, key_scales_ref, key_zeros_ref, layouts[0])
    values = softmax.Operand(value_words_ref, value_scales_ref, value_zeros_ref, layouts[1])
    group, block = q_ref.shape[0], block_sizes.block_kv
    length = jnp.minimum(length_ref[...], key_words_ref.shape[0] * layouts[0].tokens_per_word)
    num_blocks = tiles.cdiv(length, block)
    per_split = tiles.cdiv(num_blocks, block_sizes.num_splits)
    first = pl.program_id(0) * per_split
    rows = tiles.indices(max(tiles.MIN_ROWS, tiles.power_of_two(group)))
    queries = softmax.load_queries(q_ref, rows, end=group, layout=layouts[0])

    def add_block(index, state):
        return softmax.add_block(
            index,
            state,
            queries,
            keys,
            values,
            lambda positions: (positions < length)[None, :],
            block_kv=block,
            end=length,
            softmax_scale=softmax_scale,
        )

    last = jnp.minimum(first + per_split, num_blocks)
    state = jax.lax.fori_loop(first, last, add_block, softmax.start(queries, values=values))
    outs, lse = softmax.finish(state)
    softmax.store_output(out_ref, rows, outs, end=group)
    tiles.store_vector(lse_ref, rows, lse, end=group)
