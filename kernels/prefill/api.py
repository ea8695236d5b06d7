"""Causal attention of a chunk of new tokens over cached keys and values, their own included."""

import functools

from jaxtyping import Array, Float, Int

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.no_gradient import refuse_gradient
from kernels.packed import Packed
from kernels.packed import config as packed_config
from kernels.prefill import triton, xla
from kernels.prefill.config import heuristic
from kernels.tiles import BlockSizes

_NO_GRADIENT = "prefill has no gradient; full_attention and streaming_attention have"


def prefill(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"] | Packed,
    v: Float[Array, "batch kv_heads slots head_dim"] | Packed,
    offsets: Int[Array, " batch"],
    *,
    softmax_scale: float,
    implementation: Implementation = "auto",
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend with query t of row b to slots 0 .. offsets[b] + t.

    The chunk's own keys and values must be in the cache already. Queries go in blocks, and each
    block walks the key blocks up to its last query, so that memory does not grow with the cache and
    keys beyond the diagonal are not multiplied. Query head i reads KV head i // group.

    Args:
      q: rotated queries of the chunk.
      k: cached keys, slot = position; packed ones are read as they are.
      v: cached values; finite in slots nobody sees too, which count 0 times.
      offsets: position of each row's first query; a query before position 0 sees nothing, and gets
        output 0 and lse -inf.
      softmax_scale: factor on the scores.
      implementation: see kernels.dispatch.
      block_sizes: tile sizes of the kernel; the XLA version has its own. Default: chosen from the
        shapes.

    Returns:
      The output in the dtype of `q`, and its lse (natural logarithm, float32; float64 for float64).

    Raises:
      NotImplementedError: the named implementation cannot run this case; the message says why.
    """
    limits.check_shapes(q, k, v, kv_heads_axis=1)
    limits.check_rows("offsets", offsets, q.shape[0])

    def run_triton(interpret: bool):
        length, head_dim = q.shape[1], q.shape[3]
        if isinstance(k, Packed):
            chosen = block_sizes or packed_config.prefill_heuristic(
                head_dim=head_dim, dtype=q.dtype, layout=k.layout
            )
        else:
            chosen = block_sizes or heuristic(
                length=length, head_dim=head_dim, dtype=q.dtype, gpu=compat.tile_gpu()
            )
        kernel = functools.partial(
            triton.prefill, softmax_scale=softmax_scale, block_sizes=chosen, interpret=interpret
        )
        return refuse_gradient(kernel, _NO_GRADIENT)(q, k, v, offsets)

    return dispatch(
        implementation,
        xla=lambda: xla.prefill(q, k, v, offsets, softmax_scale=softmax_scale),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
    )
