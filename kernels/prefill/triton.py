"""Causal attention of a chunk over a long cache, for the Triton lowering.

Program (i, n, b) owns block_q queries of query head n in row b, the last block first, since it has
the most keys to walk. Keys and values of the head's KV head come in tiles; those that all queries
of the block see are not masked. Query, running maximum, sum and output stay in registers (float32).
The programs of one head run side by side, and so do the heads of one group: they find each other's
tiles in the L2 cache.

Offsets are read at run time: one compilation serves every chunk of its length.

Measured: not yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, masks, online_softmax, tiles
from kernels.tiles import BlockSizes


def prefill(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"]
    | Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"]
    | Float[Array, "batch slots kv_heads head_dim"],
    offsets: Int[Array, " batch"],
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
    heads_first: bool = True,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.prefill; `heads_first` tells how keys and values lie."""
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = (k.shape[1:3]) if heads_first else (k.shape[2], k.shape[1])
    group = num_q_heads // num_kv_heads
    num_blocks = tiles.cdiv(length, block_sizes.block_q)
    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    if heads_first:
        kv_spec = pl.BlockSpec((None, None, slots, head_dim), lambda i, n, b: (b, n // group, 0, 0))
    else:
        kv_spec = pl.BlockSpec((None, slots, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    out, lse = compat.pallas_call(
        functools.partial(_kernel, softmax_scale=softmax_scale, block_sizes=block_sizes),
        name="duo_prefill",
        grid=(num_blocks, num_q_heads, batch),
        in_specs=[q_spec, kv_spec, kv_spec, pl.BlockSpec((None,), lambda i, n, b: (b,))],
        out_specs=[q_spec, pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, length), jnp.float32),
        ],
        num_warps=block_sizes.num_warps,
        num_stages=block_sizes.num_stages,
        interpret=interpret,
    )(q, k, v, offsets.astype(jnp.int32))
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    q_ref,  # [length, head_dim]
    k_ref,  # [slots, head_dim]
    v_ref,  # [slots, head_dim]
    offset_ref,  # []
    out_ref,  # [length, head_dim]
    lse_ref,  # [length]
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
):
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    length, slots = q_ref.shape[0], k_ref.shape[0]
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    rows = tiles.indices(block_q, first_row)
    first_position = offset_ref[...] + first_row
    q_positions = tiles.indices(block_q, first_position)
    q = tiles.load(q_ref, rows, end=length)

    def add_block(index, state, *, masked: bool):
        positions = tiles.indices(block_kv, index * block_kv)
        k = tiles.load(k_ref, positions, end=slots)
        v = tiles.load(v_ref, positions, end=slots)
        mask = None
        if masked:
            mask = masks.causal(q_positions, positions) & (positions < slots)[None, :]
        return online_softmax.add_block(state, q, k, v, mask, softmax_scale=softmax_scale)

    end = jnp.clip(first_position + block_q, 0, slots)
    seen_by_all = jnp.clip(first_position, 0, slots) // block_kv
    state = online_softmax.start(q)
    state = jax.lax.fori_loop(0, seen_by_all, functools.partial(add_block, masked=False), state)
    state = jax.lax.fori_loop(
        seen_by_all, tiles.cdiv(end, block_kv), functools.partial(add_block, masked=True), state
    )
    out, lse = online_softmax.finish(state)
    tiles.store(out_ref, rows, out, end=length)
    tiles.store_vector(lse_ref, rows, lse, end=length)
