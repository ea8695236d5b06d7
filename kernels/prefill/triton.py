"""Causal attention of a chunk over a long cache, for the Triton lowering.

Program (i, n, b) owns block_q queries of query head n in row b, the last block first, since it has
the most keys to walk. The cache's reader (kernels.reader) reads and multiplies tiles of the head's
keys and values; tiles that all queries of the block see are not masked. Query, running
maximum, sum and output stay in registers (float32). The programs of one head run side by side, and
so do the heads of one group: they find each other's tiles in the L2 cache.

Starts are read at run time: one compilation serves every chunk of its length.

Measured on an H200 (docs/gpu.md): 400 TFLOP/s in bfloat16, head_dim 128.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import compat, masks, reader, stripes, tile_io
from kernels.pages import Pages, operands
from kernels.tiles import AttentionTiles


def prefill_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"],
    v: Float[Array, "rows kv_heads slots head_dim"],
    starts: Int[Array, " batch"],
    pages: Pages | None,
    *,
    shares: int,
    softmax_scale: float,
    tiles: AttentionTiles,
    interpret: bool,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.prefill_attention."""
    group = q.shape[2] // k.shape[1]
    cache = operands(k, v, pages, lambda i, n, b: (b, n // group), name="duo_prefill")
    return attend(
        q,
        cache,
        starts,
        shares=shares,
        softmax_scale=softmax_scale,
        tiles=tiles,
        interpret=interpret,
    )


def attend(
    q: Float[Array, "batch length q_heads head_dim"],
    cache: reader.Operands,
    starts: Int[Array, " batch"],
    *,
    shares: int = 1,
    softmax_scale: float,
    tiles: AttentionTiles,
    interpret: bool,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend to a cache; its index map takes (query block, query head, row)."""
    batch, length, num_q_heads, head_dim = q.shape
    num_blocks = tile_io.cdiv(length, tiles.block_q)
    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    out, lse = compat.pallas_call(
        functools.partial(
            _kernel, read=cache.read_with(tiles, softmax_scale), shares=shares, tiles=tiles
        ),
        name=cache.name,
        grid=(num_blocks, num_q_heads, batch),
        in_specs=[q_spec, *cache.specs, pl.BlockSpec((None,), lambda i, n, b: (b,))],
        out_specs=[q_spec, pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, length), jnp.float32),
        ],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(q, *cache.arrays, starts.astype(jnp.int32))
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(
    q_ref,  # [length, head_dim]
    *refs,  # the cache's, for its reader; start []; out [length, head_dim]; lse [length]
    read: Callable[[Sequence[jax.Ref]], reader.Reader],
    shares: int,
    tiles: AttentionTiles,
):
    *cached, start_ref, out_ref, lse_ref = refs
    cache = read(cached)
    block_q, block_kv = tiles.block_q, tiles.block_kv
    length, slots = q_ref.shape[0], cache.slots
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    rows = tile_io.indices(block_q, first_row)
    first_position = start_ref[...] + first_row
    q_positions = tile_io.indices(block_q, first_position)
    queries = cache.load_queries(q_ref, rows, end=length)

    def visible(in_tile):
        positions = stripes.position(in_tile, shares)
        return masks.causal(q_positions, positions) & (in_tile < slots)[None, :]

    def walk(state, first, end, mask):
        def add_block(index, state):
            return cache.add_block(index, state, queries, mask, end=slots)

        return jax.lax.fori_loop(first, end, add_block, state)

    end = tile_io.cdiv(stripes.filled(first_position + block_q, shares, slots), block_kv)
    seen_by_all = stripes.filled(first_position, shares, slots) // block_kv
    state = walk(cache.start(queries), 0, seen_by_all, None)
    state = walk(state, seen_by_all, end, visible)
    cache.store(state, out_ref, lse_ref, rows, end=length)
