"""Causal attention of whole sequences: what training and plain models use."""

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.full import triton, xla
from kernels.prefill.config import heuristic
from kernels.tiles import BlockSizes


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
    implementation: Implementation = "auto",
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "batch length q_heads head_dim"]:
    """Attend causally: token i sees tokens 0..i.

        out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s] + mask[t, s]) v[s]

    Differentiable; the kernel in reverse mode (jax refuses forward mode with a TypeError). Query
    head i reads KV head i // group.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      softmax_scale: factor on the scores, usually head_dim ** -0.5.
      implementation: see kernels.dispatch. The kernel is that of prefill; its gradient is computed
        by the XLA version.
      block_sizes: tile sizes of the kernel; the XLA version has its own. Default: as prefill.

    Returns:
      The output in the dtype of `q`.

    Raises:
      NotImplementedError: the named implementation cannot run this case; the message says why.
    """
    limits.check_sequences(q, k, v)

    def run_triton(interpret: bool):
        static = triton.Static(
            softmax_scale=softmax_scale,
            block_sizes=block_sizes
            or heuristic(
                length=q.shape[1], head_dim=q.shape[3], dtype=q.dtype, gpu=compat.tile_gpu()
            ),
            interpret=interpret,
        )
        return triton.full_attention(static, q, k, v)

    return dispatch(
        implementation,
        xla=lambda: xla.full_attention(q, k, v, softmax_scale=softmax_scale),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
    )
