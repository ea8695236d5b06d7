"""Causal attention of a chunk of new tokens over cached keys and values, their own included."""

from jaxtyping import Array, Float, Int

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.prefill import triton, xla
from kernels.prefill.config import heuristic
from kernels.tiles import BlockSizes


def prefill(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
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
      k: cached keys, slot = position.
      v: cached values; finite in slots nobody sees too, which count 0 times.
      offsets: position of each row's first query.
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
        return triton.prefill(
            q,
            k,
            v,
            offsets,
            softmax_scale=softmax_scale,
            block_sizes=block_sizes
            or heuristic(
                length=q.shape[1],
                head_dim=q.shape[3],
                dtype=q.dtype,
                gpu=compat.tile_gpu(),
            ),
            interpret=interpret,
        )

    return dispatch(
        implementation,
        xla=lambda: xla.prefill(q, k, v, offsets, softmax_scale=softmax_scale),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
    )
