"""Streaming attention of a chunk, for Hopper through Mosaic; forward only.

Program (row, head, block) owns block_q queries of a query head; kernels.mosaic.walk has the map of
its warpgroups. Three ranges of tiles: the sinks, the cached recent tokens that its first query
still sees, and the chunk's own tokens from there to its diagonal; nothing else is loaded. Every
tile is masked: with windows of a few hundred tokens most of them are cut by an edge. Lengths are
read at run time.

In bfloat16 with head_dim 128: 128 queries by tiles of 64 keys in 3 stages, 147 KiB of shared
memory, 168 registers at the start (docs/kernels_mosaic.md). Measured on an H200 (docs/gpu.md): 0.87
to 0.92 times the speed of the Triton kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels import masks
from kernels.mosaic import source, work
from kernels.prefill.mosaic import attend, block_of_queries
from kernels.streaming.options import StreamingOptions
from kernels.streaming.past import Past, nothing
from kernels.tile_io import cdiv


def streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    past: Past | None = None,
    *,
    options: StreamingOptions,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """See kernels.streaming_attention."""
    if past is None:
        past = nothing(k, v, sink_size=min(options.sink_size, k.shape[1]))
    sinks, recents = past.sink_keys.shape[2], past.recent_keys.shape[2]
    cached = [work.aligned(x, axis=2) for x in past.buffers() if x.size]
    plan = functools.partial(
        _plan,
        group=q.shape[2] // k.shape[2],
        length=q.shape[1],
        sinks=sinks,
        recents=recents,
        options=options,
    )
    return attend(
        plan,
        q,
        (k, v),
        (past.lengths.astype(jnp.int32), *(work.aligned(x, axis=1) for x in (k, v)), *cached),
        name="duo_streaming_mosaic",
        softmax_scale=options.softmax_scale,
        tiles=options.tiles.forward,
        interpret=options.interpret,
    )


def _plan(
    q: jax.Ref,
    past_lengths: jax.Ref,
    k: jax.Ref,
    v: jax.Ref,
    *refs: jax.Ref,  # sink k, v; recent k, v, where there are any; then outputs
    group: int,
    length: int,
    sinks: int,
    recents: int,
    options: StreamingOptions,
) -> work.Work:
    *cached, out, lse = refs
    sink_size, recent_size = options.sink_size, options.recent_size
    block_q, block_kv = options.tiles.forward.block_q, options.tiles.forward.block_kv
    row, kv_head = lax.axis_index("row"), lax.div(lax.axis_index("head"), group)
    first_row = lax.axis_index("block") * block_q
    past_length = past_lengths[row]

    def tiles(refs, tile_of, *, first: Any, end: Any, origin: Any, window: bool):
        """Return the tiles with slots first .. end - 1; slot j has position origin + j."""

        def visible(rows, slots):
            positions = origin + slots
            seen = masks.streaming_pairs(
                past_length + first_row + rows,
                positions,
                sink_size=sink_size,
                recent_size=recent_size,
            )
            seen &= slots < end
            return seen & (positions >= sink_size) if window else seen  # sinks count once

        return work.Range(
            tile=tile_of(row, kv_head),
            keys=refs[:1],
            values=refs[1:],
            first=lax.div(first, block_kv),
            end=cdiv(end, block_kv),
            mask=visible,
        )

    ranges = []
    if sinks:
        end = jnp.minimum(past_length + first_row + block_q, sinks)
        where = {"first": 0, "end": end, "origin": 0, "window": False}
        ranges.append(tiles(cached[:2], source.in_cache, **where))
    # Where the window of the block's first query begins, counted from the chunk's first token.
    window_start = first_row - (recent_size - 1)
    if recents:
        first = jnp.maximum(window_start + recents, 0)
        end = recents * (first < recents).astype(jnp.int32)  # 0 where the window begins later
        where = {"first": first, "end": end, "origin": past_length - recents, "window": True}
        ranges.append(tiles(cached[-2:], source.in_cache, **where))
    first, end = jnp.maximum(window_start, 0), jnp.minimum(first_row + block_q, length)
    where = {"first": first, "end": end, "origin": past_length, "window": True}
    ranges.append(tiles((k, v), source.in_sequence, **where))
    return block_of_queries(q, out, lse, first_row, ranges)
