"""Attention over parts of the keys, merged into attention over all of them."""

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.merge import triton, xla
from kernels.merge.heuristic import choose_tiles
from kernels.tiles import MergeTiles

_NO_MOSAIC = limits.Refusal(
    reason="merge_lse has no Mosaic kernel; implementation='xla' merges the parts of Mosaic's too"
)


def merge_lse(
    outs: Float[Array, "parts *rows head_dim"],
    lses: Float[Array, "parts *rows"],
    *,
    implementation: Implementation = "xla",
    tiles: MergeTiles | None = None,
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Merge the outputs of attention over disjoint parts of the keys (flash-decoding).

        lse = log(sum_p exp(lses[p])),  out = sum_p exp(lses[p] - lse) outs[p]

    Args:
      outs: attention output of every part; finite where a part saw no key.
      lses: natural logarithm of every part's sum of exponentials; -inf where a part saw no key.
      implementation: see kernels.dispatch. The default is "xla", not "auto": XLA's version has a
        gradient.
      tiles: tile sizes of the kernel. Default: chosen from the shapes and the GPU.

    Returns:
      Output and lse over all keys; 0 and -inf where no part saw a key, NaN where an lse is NaN. The
      output has the dtype of `outs`, the lse is float32 (float64 for float64).

    Raises:
      UnsupportedError: the named implementation cannot run this case, or is asked for a gradient
        that its kernel does not have; the message says why.
      ValueError: the arrays do not fit one another.
    """
    limits.check_parts(outs, lses)

    def run_triton(interpret: bool):
        chosen = tiles or choose_tiles(
            parts=outs.shape[0],
            rows=lses[0].size,
            head_dim=outs.shape[-1],
            gpu=compat.tile_gpu(),
        )
        return triton.merge_lse(outs, lses, tiles=chosen, interpret=interpret)

    return dispatch(
        implementation,
        op="merge",
        xla=lambda: xla.merge_lse(outs, lses),
        triton=run_triton,
        refusal=limits.refusal(outs) or limits.too_large(lses),
        mosaic=run_triton,
        mosaic_refusal=_NO_MOSAIC,
    )
