"""Full attention by the prefill kernel, which then reads the sequence as its own cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import compat
from kernels.full import xla
from kernels.prefill import triton as prefill
from kernels.prefill.config import heuristic


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    softmax_scale: float,
    interpret: bool,
) -> Float[Array, "batch length q_heads head_dim"]:
    """See kernels.full_attention; the gradient is that of the XLA version."""
    out, _ = prefill.prefill(
        q,
        k,
        v,
        jnp.zeros(q.shape[0], jnp.int32),
        softmax_scale=softmax_scale,
        block_sizes=heuristic(
            length=q.shape[1], head_dim=q.shape[3], dtype=q.dtype, gpu=compat.tile_gpu()
        ),
        interpret=interpret,
        heads_first=False,
    )
    return out


def _forward(q, k, v, softmax_scale, interpret):
    return full_attention(q, k, v, softmax_scale, interpret), (q, k, v)


def _backward(softmax_scale, interpret, residuals, gradient):
    del interpret
    attend = functools.partial(xla.full_attention, softmax_scale=softmax_scale)
    return jax.vjp(attend, *residuals)[1](gradient)


full_attention.defvjp(_forward, _backward)
