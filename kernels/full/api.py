"""Causal attention of whole sequences: what training and plain models use."""

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.dispatch import Implementation, dispatch
from kernels.full import triton, xla
from kernels.full.config import heuristic
from kernels.streaming.config import Config


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
    implementation: Implementation = "auto",
    config: Config | None = None,
) -> Float[Array, "batch length q_heads head_dim"]:
    """Attend causally: token i sees tokens 0..i.

        out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s] + mask[t, s]) v[s]

    Differentiable; the kernels once, in reverse mode (jax refuses forward mode with a TypeError),
    with memory that grows with the length only. Query head i reads KV head i // group.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      softmax_scale: factor on the scores, usually head_dim ** -0.5.
      implementation: see kernels.dispatch.
      config: tile sizes of the kernels; the XLA version has its own. Default: chosen from the
        shapes.

    Returns:
      The output in the dtype of `q`.

    Raises:
      NotImplementedError: the named implementation cannot run this case, or is asked for a second
        derivative that its kernels do not have; or an array is larger than kernels can address
        ("auto" too, see kernels.dispatch). The message says why.
      ValueError: the arrays do not fit one another.
    """
    limits.check_sequences(q, k, v)

    def run_triton(interpret: bool):
        chosen = config or heuristic(
            length=q.shape[1], head_dim=q.shape[3], dtype=q.dtype, gpu=compat.tile_gpu()
        )
        static = triton.Static(softmax_scale=softmax_scale, config=chosen, interpret=interpret)
        return triton.full_attention(static, q, k, v)

    return dispatch(
        implementation,
        xla=lambda: xla.full_attention(q, k, v, softmax_scale=softmax_scale),
        triton=run_triton,
        refusal=limits.refusal(q, k, v),
    )
