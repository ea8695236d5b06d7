"""Attention of one new token per row over cached keys and values."""

import dataclasses
import functools

from jaxtyping import Array, Float, Int

from kernels import compat, limits
from kernels import pages as paging
from kernels.decode import mosaic, triton, xla
from kernels.decode.heuristic import choose_tiles
from kernels.dispatch import Implementation, dispatch
from kernels.mosaic import tiles as mosaic_tiles
from kernels.no_gradient import refuse_gradient
from kernels.packed import Packed, layout_of
from kernels.pages import Pages
from kernels.tiles import DecodeTiles

_NO_GRADIENT = "decode_attention has no gradient; full_attention and streaming_attention have"


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    lengths: Int[Array, " batch"],
    *,
    pages: Pages | None = None,
    softmax_scale: float,
    implementation: Implementation = "auto",
    tiles: DecodeTiles | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Attend with one query per row to the first `lengths[b]` slots of row b.

        out[b] = softmax(softmax_scale * q[b] K[b, :lengths[b]]^T) V[b, :lengths[b]]

    The order of slots does not matter, so this serves full caches and rings alike. Query head i
    reads KV head i // group.

    Args:
      q: the rotated query of every row.
      k: cached keys, already rotated; packed keys are read without unpacking the cache.
      v: cached values. Slots beyond `lengths` have weight 0 and must hold finite numbers.
      lengths: filled slots per row, the new token's own included; a row of 0 gets output 0.
      pages: of a paged cache (kernels.pages), whose keys and values are pools of pages. Default:
        keys and values have a row for every row of queries.
      softmax_scale: factor on the scores.
      implementation: see kernels.dispatch.
      tiles: tile sizes of the kernel; the XLA version has its own. Default: chosen from the shapes
        and the GPU.

    Returns:
      The output in the dtype of `q`, and its lse (natural logarithm, float32; float64 for float64),
      with which parts of a cache can be merged.

    Raises:
      UnsupportedError: the named implementation cannot run this case; the message says why.
      ValueError: the arrays do not fit one another.
    """
    limits.check_shapes(q, k, v, kv_heads_axis=1, paged=pages is not None)
    if pages is not None:
        paging.check(k, pages, q.shape[0])
    limits.check_rows("lengths", lengths, q.shape[0])

    def run_triton(interpret: bool):
        chosen = tiles or choose_tiles(
            batch=q.shape[0],
            kv_heads=k.shape[1],
            slots=paging.num_slots(k, pages),
            head_dim=q.shape[2],
            dtype=q.dtype,
            gpu=compat.tile_gpu(),
            layout=layout_of(k),
        )
        if pages is not None:  # a tile lies in one page
            chosen = dataclasses.replace(chosen, block_kv=min(chosen.block_kv, k.shape[2]))
        kernel = functools.partial(
            triton.decode_attention, softmax_scale=softmax_scale, tiles=chosen, interpret=interpret
        )
        return refuse_gradient(kernel, _NO_GRADIENT)(q, k, v, lengths, pages)

    def run_mosaic(interpret: bool):
        chosen = tiles or mosaic_tiles.for_decode(
            batch=q.shape[0],
            kv_heads=k.shape[1],
            slots=paging.num_slots(k, pages),
            head_dim=q.shape[2],
            packed=isinstance(k, Packed),
            gpu=compat.tile_gpu(),
        )
        if pages is not None:
            chosen = dataclasses.replace(chosen, block_kv=min(chosen.block_kv, k.shape[2]))
        kernel = functools.partial(
            mosaic.decode_attention, softmax_scale=softmax_scale, tiles=chosen, interpret=interpret
        )
        return refuse_gradient(kernel, _NO_GRADIENT)(q, k, v, lengths, pages)

    return dispatch(
        implementation,
        op="decode_packed" if isinstance(k, Packed) else "decode",
        xla=lambda: xla.decode_attention(q, k, v, lengths, pages, softmax_scale=softmax_scale),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
        mosaic=run_mosaic,
        mosaic_refusal=limits.mosaic_refusal(q) or mosaic_tiles.decode_refusal(q, k, v),
    )
