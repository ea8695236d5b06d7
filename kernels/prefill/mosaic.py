"""Causal attention of a chunk over a long cache, for Hopper through Mosaic.

Program (row, head, block) owns block_q queries of a query head, the last block first, since it has
the most keys to walk; kernels.mosaic.walk has the map of its warpgroups. Two ranges of tiles: those
that all of its queries see, unmasked, then those that the diagonal cuts. Later ones are not loaded.
The programs of one head run side by side, and so do the heads of one group: they find each other's
tiles in the L2 cache.

Starts are read at run time: one compilation serves every chunk of its length.

In bfloat16 with head_dim 128: 128 queries by tiles of 128 keys in 2 stages, 195 KiB of shared
memory, 168 registers at the start (docs/kernels_mosaic.md). Measured on an H200 (docs/gpu.md): 490
to 506 TFLOP/s in bfloat16, head_dim 128.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import masks, stripes
from kernels.mosaic import source, walk, work
from kernels.pages import Pages, num_slots
from kernels.tile_io import cdiv
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
    table = [] if pages is None else [pages.astype(jnp.int32)]
    plan = functools.partial(
        plan_causal,
        tile_of=source.in_cache if pages is None else source.in_pages,
        group=q.shape[2] // k.shape[1],
        paged=pages is not None,
        length=q.shape[1],
        slots=num_slots(k, pages),
        shares=shares,
        tiles=tiles,
    )
    return attend(
        plan,
        q,
        (k, v),
        (starts.astype(jnp.int32), *table, *work.cached(k), *work.cached(v)),
        name=work.name("duo_prefill", k, pages),
        softmax_scale=softmax_scale,
        tiles=tiles,
        interpret=interpret,
    )


def attend(
    plan: Callable[..., work.Work],
    q: Float[Array, "batch length q_heads head_dim"],
    kv: tuple[Array, Array],
    operands: tuple[Array, ...],
    *,
    name: str,
    softmax_scale: float,
    tiles: AttentionTiles,
    interpret: bool,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Run a plan, of refs of q, the operands, output and lse, for all blocks of queries.

    `kv` tells the sizes of keys and values.
    """
    batch, length, num_q_heads, _ = q.shape
    num_blocks = cdiv(length, tiles.block_q)
    q = work.aligned(q, axis=1)
    out, lse = walk.call(
        plan,
        name=name,
        grid={"row": batch, "head": num_q_heads, "block": num_blocks},
        shape=work.Shape.of(tiles, tiles.block_q, q, *kv, softmax_scale),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_q_heads, num_blocks * tiles.block_q), jnp.float32),
        ),
        interpret=interpret,
    )(q, *operands)
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


def block_of_queries(
    q: jax.Ref, out: jax.Ref, lse: jax.Ref, first_row: Array, ranges: list[work.Range]
) -> work.Work:
    """Return the work on a program's queries from `first_row` on."""
    row, head = lax.axis_index("row"), lax.axis_index("head")

    def rows(worker):
        return pl.ds(first_row + worker * work.ROWS, work.ROWS)

    return work.Work(
        queries=lambda worker: q.at[row, rows(worker), head],
        out=lambda worker: out.at[row, rows(worker), head],
        lse=lambda worker: lse.at[row, head, rows(worker)],
        ranges=ranges,
    )


def plan_causal(
    q: jax.Ref,
    starts: jax.Ref,
    *refs: jax.Ref,  # the table of a paged cache; what is stored of keys, then of values; outputs
    tile_of: Callable[..., source.Tile],
    group: int,
    paged: bool,
    length: int,
    slots: int,
    tiles: AttentionTiles,
    shares: int = 1,
) -> work.Work:
    """Let each query see the slots up to its own position."""
    *cached, out, lse = refs
    table, (keys, values) = cached[:paged], work.halves(cached[paged:])
    block_q, block_kv = tiles.block_q, tiles.block_kv
    row, head = lax.axis_index("row"), lax.axis_index("head")
    last = lse.shape[2] // block_q - 1
    first_row = (last - lax.axis_index("block")) * block_q
    first_position = starts[row] + first_row
    tile = tile_of(*table, row, lax.div(head, group))

    def visible(rows, in_tile):
        positions = stripes.position(in_tile, shares)
        return masks.causal_pairs(first_position + rows, positions) & (in_tile < slots)

    # A block may reach beyond the last query, but loads nothing for that.
    seen_by_all = lax.div(stripes.filled(first_position + 1, shares, slots), block_kv)
    last_position = starts[row] + jnp.minimum(first_row + block_q, length) - 1
    end = cdiv(stripes.filled(last_position + 1, shares, slots), block_kv)
    ranges = [
        work.Range(tile=tile, keys=keys, values=values, first=begin, end=stop, mask=mask)
        for begin, stop, mask in ((0, seen_by_all, None), (seen_by_all, end, visible))
    ]
    return block_of_queries(q, out, lse, first_row, ranges)
