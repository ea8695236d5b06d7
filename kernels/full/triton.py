"""Full attention by the prefill kernel, which then reads the sequence as its own cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.full import xla
from kernels.prefill import triton as prefill
from kernels.tiles import BlockSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a call needs beside its arrays."""

    softmax_scale: float
    block_sizes: BlockSizes
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def full_attention(
    static: Static,
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
) -> Float[Array, "batch length q_heads head_dim"]:
    """See kernels.full_attention; the gradient is that of the XLA version."""
    out, _ = prefill.prefill(
        q,
        k,
        v,
        jnp.zeros(q.shape[0], jnp.int32),
        softmax_scale=static.softmax_scale,
        block_sizes=static.block_sizes,
        interpret=static.interpret,
        heads_first=False,
    )
    return out


def _forward(static: Static, q, k, v):
    return full_attention(static, q, k, v), (q, k, v)


def _backward(static: Static, residuals, gradient):
    attend = functools.partial(xla.full_attention, softmax_scale=static.softmax_scale)
    return jax.vjp(attend, *residuals)[1](gradient)


full_attention.defvjp(_forward, _backward)
