"""Attention over parts of the keys, merged into attention over all of them."""

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.merge import triton, xla
from kernels.merge.config import BlockSizes, heuristic


def merge_lse(
    outs: Float[Array, "parts *rows head_dim"],
    lses: Float[Array, "parts *rows"],
    *,
    implementation: Implementation = "xla",
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Merge the outputs of attention over disjoint parts of the keys (flash-decoding).

        lse = log(sum_p exp(lses[p])),  out = sum_p exp(lses[p] - lse) outs[p]

    Args:
      outs: attention output of every part; finite where a part saw no key.
      lses: its logarithm of the sum of exponentials, natural; -inf where a part saw no key.
      implementation: see kernels.dispatch. The default is not "auto", as that of the other ops,
        but "xla", which merges the splits of the decode kernel too: it has a gradient, and nobody
        has measured yet whether one kernel, which walks the parts one after the other, beats the
        five small ones that XLA makes of it (compiled for an A100).
      block_sizes: tile sizes of the kernel. Default: chosen from the shapes and the GPU.

    Returns:
      Output and lse over all keys; 0 and -inf where no part saw a key, NaN where an lse is NaN. The
      output has the dtype of `outs`, the lse is float32 (float64 for float64).

    Raises:
      NotImplementedError: the named implementation cannot run this case, or is asked for a gradient
        that its kernel does not have; the message says why.
    """
    limits.check_parts(outs, lses)

    def run_triton(interpret: bool):
        sizes = block_sizes or heuristic(
            rows=lses[0].size, head_dim=outs.shape[-1], gpu=compat.tile_gpu()
        )
        return triton.merge_lse(outs, lses, block_sizes=sizes, interpret=interpret)

    return dispatch(
        implementation,
        xla=lambda: xla.merge_lse(outs, lses),
        triton=run_triton,
        refusal=limits.refusal(outs) or limits.too_large(lses),
    )
