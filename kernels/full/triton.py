"""Full attention by the kernels of other ops.

Forward it is a prefill that reads the sequence as its own cache; backward it is streaming attention
whose window is the whole sequence.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import reader
from kernels.no_gradient import refuse_gradient
from kernels.prefill import triton as prefill
from kernels.streaming import backward as streaming
from kernels.streaming.options import StreamingOptions

_NO_SECOND = "the kernels of full_attention have no second derivatives; implementation='xla' has"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def full_attention(
    options: StreamingOptions,
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
) -> Float[Array, "batch length q_heads head_dim"]:
    """See kernels.full_attention; differentiable once, in reverse mode."""
    return _with_lse(options, q, k, v)[0]


def _with_lse(options: StreamingOptions, q, k, v):
    group = q.shape[2] // k.shape[2]
    return prefill.attend(
        q,
        reader.operands(
            k, v, lambda i, n, b: (b, n // group), name="duo_prefill", heads_first=False
        ),
        jnp.zeros(q.shape[0], jnp.int32),
        softmax_scale=options.softmax_scale,
        tiles=options.tiles.forward,
        interpret=options.interpret,
    )


def _forward(options: StreamingOptions, q, k, v):
    out, lse = refuse_gradient(functools.partial(_with_lse, options), _NO_SECOND)(q, k, v)
    return out, (q, k, v, out, lse)


def _backward(options: StreamingOptions, residuals, d_out):
    backward = functools.partial(streaming.backward, options=options, name="duo_full")
    return refuse_gradient(backward, _NO_SECOND)(*residuals, d_out)


full_attention.defvjp(_forward, _backward)
