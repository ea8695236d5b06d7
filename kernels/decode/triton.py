"""Decode attention with the keys split over programs (flash-decoding), for the Triton lowering.

Program (s, k, b) owns split s of the cache of KV head k in row b, for the whole group of query
heads that reads it, padded to 16 rows, the smallest tile of a matrix instruction. So each key and
value is read once. A row's filled slots are shared out evenly among its splits at run time: short
texts in long caches keep all programs busy too. Query, running maximum, sum and output stay in
registers (float32); splits are merged by their lse outside.

Measured: not yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, online_softmax, tiles
from kernels.decode.config import BlockSizes
from kernels.merge import merge_lse


def decode(
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    lengths: Int[Array, " batch"],
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """See kernels.decode."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = k.shape[1:3]
    group = num_q_heads // num_kv_heads
    num_splits = block_sizes.num_splits
    kv_spec = pl.BlockSpec((None, None, slots, head_dim), lambda s, k, b: (b, k, 0, 0))
    out, lse = compat.pallas_call(
        functools.partial(_kernel, softmax_scale=softmax_scale, block_sizes=block_sizes),
        name="duo_decode",
        grid=(num_splits, num_kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda s, k, b: (b, k, 0, 0)),
            kv_spec,
            kv_spec,
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
    )(q.reshape(batch, num_kv_heads, group, head_dim), k, v, lengths.astype(jnp.int32))
    out, lse = merge_lse(out, lse)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])


def _kernel(
    q_ref,  # [group, head_dim]
    k_ref,  # [slots, head_dim]
    v_ref,  # [slots, head_dim]
    length_ref,  # []
    out_ref,  # [group, head_dim]
    lse_ref,  # [group]
    *,
    softmax_scale: float,
    block_sizes: BlockSizes,
):
    group, block = q_ref.shape[0], block_sizes.block_kv
    length = jnp.minimum(length_ref[...], k_ref.shape[0])
    num_blocks = tiles.cdiv(length, block)
    per_split = tiles.cdiv(num_blocks, block_sizes.num_splits)
    first = pl.program_id(0) * per_split
    rows = tiles.indices(max(tiles.MIN_ROWS, tiles.power_of_two(group)))
    q = tiles.load(q_ref, rows, end=group)

    def add_block(index, state):
        positions = tiles.indices(block, index * block)
        k = tiles.load(k_ref, positions, end=length)
        v = tiles.load(v_ref, positions, end=length)
        mask = jnp.broadcast_to((positions < length)[None, :], (rows.shape[0], block))
        return online_softmax.add_block(state, q, k, v, mask, softmax_scale=softmax_scale)

    last = jnp.minimum(first + per_split, num_blocks)
    state = jax.lax.fori_loop(first, last, add_block, online_softmax.start(q))
    out, lse = online_softmax.finish(state)
    tiles.store(out_ref, rows, out, end=group)
    tiles.store_vector(lse_ref, rows, lse, end=group)
