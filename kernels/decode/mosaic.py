"""Decode attention with the keys split over programs (flash-decoding), for Hopper through Mosaic.

Program (row, kv_head, split) owns a split of the cache of a KV head, for the whole group of query
heads that reads it, padded to 64 rows, those of one warpgroup's matrix instructions: each key and
value is read once. kernels.mosaic.walk has the map; one warpgroup multiplies, one loads. A row's
filled slots are divided evenly among its splits at run time, so short texts in long caches keep all
programs busy too. Splits are written in float32 and merged by their lse outside the kernel.

Tiles of a paged cache get their address from the table (kernels.mosaic.source); packed ones, in 8,
4 or 2 bits, become matrices in shared memory before they are multiplied (kernels.mosaic.reader).

With head_dim 128: tiles of 64 keys, in bfloat16 in 2 stages and 123 KiB of shared memory, packed in
4 and 127 to 159 KiB; 150 to 221 registers. With 64, packed: 71 to 87 KiB, 112 to 128 registers, so
two programs a core (docs/kernels_mosaic.md). Measured on an H200 (docs/gpu.md): as fast as the
Triton kernel, slower from int8; packed caches of head_dim 64 and 96: not measured yet.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.decode import splits
from kernels.mosaic import source, walk, work
from kernels.packed import Packed
from kernels.pages import Pages, num_slots
from kernels.tile_io import cdiv
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
    table = [] if pages is None else [pages.astype(jnp.int32)]
    plan = functools.partial(
        _plan,
        tile_of=source.in_cache if pages is None else source.in_pages,
        paged=pages is not None,
        slots=num_slots(k, pages),
        tiles=tiles,
    )
    grouped = q.reshape(batch, num_kv_heads, group, head_dim)
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, work.ROWS - group), (0, 0)))
    parts = (tiles.num_splits, batch, num_kv_heads)
    rows = cdiv(group, work.ALIGNED) * work.ALIGNED  # that are written
    out, lse = walk.call(
        plan,
        name=work.name("duo_decode", k, pages),
        grid={"row": batch, "kv_head": num_kv_heads, "split": tiles.num_splits},
        shape=work.Shape.of(tiles, work.ROWS, q, k, v, softmax_scale),
        out_type=(
            jax.ShapeDtypeStruct((*parts, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*parts, work.ROWS), jnp.float32),
        ),
        interpret=interpret,
    )(
        padded,
        lengths.astype(jnp.int32),
        *table,
        *work.cached(k),
        *work.cached(v),
    )
    out, lse = splits.merged(out[..., :group, :], lse[..., :group], implementation="auto")
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:2])


def _plan(
    q: jax.Ref,
    lengths: jax.Ref,
    *refs: jax.Ref,  # the table of a paged cache; what is stored of keys, then of values; outputs
    tile_of: Callable[..., source.Tile],
    paged: bool,
    slots: int,
    tiles: DecodeTiles,
) -> work.Work:
    *cached, out, lse = refs
    table, (keys, values) = cached[:paged], work.halves(cached[paged:])
    row, kv_head, split = (lax.axis_index(x) for x in ("row", "kv_head", "split"))
    length = jnp.minimum(lengths[row], slots)
    num_blocks = cdiv(length, tiles.block_kv)
    per_split = cdiv(num_blocks, tiles.num_splits)
    first = split * per_split

    def filled(rows, positions):
        del rows
        return positions < length

    walked = work.Range(
        tile=tile_of(*table, row, kv_head),
        keys=keys,
        values=values,
        first=first,
        end=jnp.minimum(first + per_split, num_blocks),
        mask=filled,
    )
    return work.Work(
        queries=lambda worker: q.at[row, kv_head],
        out=lambda worker: out.at[split, row, kv_head],
        lse=lambda worker: lse.at[split, row, kv_head],
        ranges=[walked],
    )
