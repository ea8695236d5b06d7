"""Causal attention of a chunk of new tokens over cached keys and values, their own included."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from kernels import compat, limits
from kernels import pages as paging
from kernels.dispatch import Implementation, dispatch
from kernels.mosaic import tiles as mosaic_tiles
from kernels.no_gradient import refuse_gradient
from kernels.packed import Packed
from kernels.pages import Pages
from kernels.prefill import mosaic, triton, unpacked, xla
from kernels.prefill.heuristic import choose_tiles
from kernels.tiles import AttentionTiles

_NO_GRADIENT = "prefill_attention has no gradient; full_attention and streaming_attention have"


def prefill_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    starts: Int[Array, " batch"],
    *,
    pages: Pages | None = None,
    shares: int = 1,
    softmax_scale: float,
    implementation: Implementation = "auto",
    tiles: AttentionTiles | None = None,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend with query t of row b to the slots of positions 0 .. starts[b] + t.

    The cache must already hold the chunk's own keys and values. Each block of queries walks the
    blocks of keys up to its last query: memory does not grow with the cache, and keys beyond the
    diagonal are not multiplied. Query head i reads KV head i // group.

    Args:
      q: rotated queries of the chunk.
      k: cached keys; packed keys are unpacked block by block.
      v: cached values. Slots that no query sees have weight 0 and must hold finite numbers.
      starts: position of each row's first query, counted from that of the cache's first slot; a
        query before that sees nothing, and gets output 0 and lse -inf.
      pages: of a paged cache (kernels.pages), whose keys and values are pools of pages. Default:
        keys and values have a row for every row of queries.
      shares: caches that share the text, of which this is one (kernels.stripes). Default: slot =
        position.
      softmax_scale: factor on the scores.
      implementation: see kernels.dispatch.
      tiles: tile sizes of the kernel; the XLA version has its own. Default: chosen from the shapes
        and the GPU.

    Returns:
      The output in the dtype of `q`, and its lse (natural logarithm, float32; float64 for float64).

    Raises:
      UnsupportedError: the named implementation cannot run this case; the message says why.
      ValueError: the arrays do not fit one another.
    """
    limits.check_shapes(q, k, v, kv_heads_axis=1, paged=pages is not None)
    if pages is not None:
        paging.check(k, pages, q.shape[0])
    limits.check_rows("starts", starts, q.shape[0])

    is_packed = isinstance(k, Packed)

    def run(kernel: Callable[..., Any], tiles: AttentionTiles, interpret: bool):
        if pages is not None and not is_packed:  # a tile lies in one page
            tiles = dataclasses.replace(tiles, block_kv=min(tiles.block_kv, k.shape[2]))
        kernel = functools.partial(
            kernel, shares=shares, softmax_scale=softmax_scale, tiles=tiles, interpret=interpret
        )
        if is_packed:
            attend = functools.partial(kernel, pages=None)
            kernel = functools.partial(unpacked.prefill_attention, attend=attend, shares=shares)
        return refuse_gradient(kernel, _NO_GRADIENT)(q, k, v, starts, pages)

    def run_triton(interpret: bool):
        chosen = tiles or choose_tiles(
            length=q.shape[1],
            head_dim=q.shape[3],
            dtype=q.dtype,
            gpu=compat.tile_gpu(),
        )
        return run(triton.prefill_attention, chosen, interpret)

    def run_mosaic(interpret: bool):
        chosen = tiles or mosaic_tiles.for_attention(length=q.shape[1], head_dim=q.shape[3])
        return run(mosaic.prefill_attention, chosen, interpret)

    return dispatch(
        implementation,
        op="prefill",
        xla=lambda: xla.prefill_attention(
            q, k, v, starts, pages, shares=shares, softmax_scale=softmax_scale
        ),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
        mosaic=run_mosaic,
        mosaic_refusal=limits.mosaic_refusal(q),
    )
