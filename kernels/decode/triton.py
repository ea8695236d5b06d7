"""Decode attention with the keys split over programs (flash-decoding), for the Triton lowering.

Program (s, k, b) owns split s of the cache of KV head k in row b, for the whole group of query
heads that reads it, padded to 16 rows, the smallest tile of a matrix instruction. So each key and
value is read once. A row's filled slots are divided evenly among its splits at run time, so short
texts in long caches keep all programs busy too. Query, running maximum, sum and output stay in
registers (float32); splits are merged by their lse outside the kernel. The cache's reader
(kernels.reader) reads and multiplies the tiles.

Measured on an H200 (docs/gpu.md): 93% of the bandwidth of a copy in bfloat16.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, reader, tile_io
from kernels.decode import splits
from kernels.packed import Packed
from kernels.pages import Pages, operands
from kernels.tiles import DecodeTiles


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    lengths: Int[Array, " batch"],
    pages: Pages | None,
    *,
    softmax_scale: float,
    tiles: DecodeTiles,
    interpret: bool,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """See kernels.decode_attention."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    num_splits = tiles.num_splits
    cache = operands(k, v, pages, lambda s, k, b: (b, k), name="duo_decode")
    out, lse = compat.pallas_call(
        functools.partial(_kernel, read=cache.read_with(tiles, softmax_scale), tiles=tiles),
        name=cache.name,
        grid=(num_splits, num_kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda s, k, b: (b, k, 0, 0)),
            *cache.specs,
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
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(
        q.reshape(batch, num_kv_heads, group, head_dim),
        *cache.arrays,
        lengths.astype(jnp.int32),
    )
    out, lse = splits.merged(out, lse, implementation="interpret" if interpret else "triton")
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])


def _kernel(
    q_ref,  # [group, head_dim]
    *refs,  # the cache's, for its reader; length []; out [group, head_dim]; lse [group]
    read: Callable[[Sequence[jax.Ref]], reader.Reader],
    tiles: DecodeTiles,
):
    *cached, length_ref, out_ref, lse_ref = refs
    cache = read(cached)
    group = q_ref.shape[0]
    length = jnp.minimum(length_ref[...], cache.slots)
    num_blocks = tile_io.cdiv(length, tiles.block_kv)
    per_split = tile_io.cdiv(num_blocks, tiles.num_splits)
    first = pl.program_id(0) * per_split
    rows = tile_io.indices(max(tile_io.MIN_ROWS, tile_io.power_of_two(group)))
    queries = cache.load_queries(q_ref, rows, end=group)

    def filled(positions):
        return (positions < length)[None, :]

    def add_block(index, state):
        return cache.add_block(index, state, queries, filled, end=length)

    last = jnp.minimum(first + per_split, num_blocks)
    state = jax.lax.fori_loop(first, last, add_block, cache.start(queries))
    cache.store(state, out_ref, lse_ref, rows, end=group)
