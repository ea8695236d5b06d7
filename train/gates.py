"""Gate-mixed attention: each KV head between retrieval (gate 1) and streaming (gate 0).

    attention[head] = gate * full_attention[head] + (1 - gate) * streaming_attention[head]

(DuoAttention, section 2.2). The gate of a KV head acts on all query heads that read it. The full
term is the layer's own, or that of another stream, the teacher (`train.distillation`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from duo_jax.model import llama
from kernels import Implementation, full_attention, streaming_attention
from kernels.by_heads import by_heads
from kernels.precision import accumulator


def mix(
    gates: Float[Array, " kv_heads"],
    full: Float[Array, "batch length q_heads head_dim"],
    streaming: Float[Array, "batch length q_heads head_dim"],
) -> Float[Array, "batch length q_heads head_dim"]:
    """Blend two attention outputs head by head, in float32."""
    group = full.shape[2] // gates.shape[0]
    dtype = accumulator(full.dtype)
    alpha = jnp.repeat(gates.astype(dtype), group)[None, None, :, None]
    mixed = alpha * full.astype(dtype) + (1 - alpha) * streaming.astype(dtype)
    return mixed.astype(full.dtype)


def self_mixed_attention(
    *, sink_size: int, recent_size: int, implementation: Implementation = "auto"
) -> llama.Attend:
    """Return an attention that mixes both terms from the layer's own queries, keys and values.

    The layer input is the layer's gates, [kv_heads]. With gates 0 and 1 this is exactly the
    attention of a deployed pattern.
    """

    def attend(
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: Float[Array, " kv_heads"],
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], None]:
        softmax_scale = q.shape[-1] ** -0.5
        full = full_attention(q, k, v, softmax_scale=softmax_scale, implementation=implementation)
        streaming, _ = streaming_attention(
            q,
            k,
            v,
            sink_size=sink_size,
            recent_size=recent_size,
            softmax_scale=softmax_scale,
            implementation=implementation,
        )
        return mix(layer_input, full, streaming), None

    return attend


def chosen_attention(
    *, sink_size: int, recent_size: int, implementation: Implementation = "auto"
) -> llama.Attend:
    """Return the attention of a deployed pattern, which computes one term for each KV head.

    The layer input says which of the layer's KV heads are retrieval heads. The result is that of
    `self_mixed_attention` with gates 1 and 0.
    """

    def attend(
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: Bool[Array, " kv_heads"],
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], None]:
        options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
        full = functools.partial(full_attention, **options)
        streaming = functools.partial(
            streaming_attention, sink_size=sink_size, recent_size=recent_size, **options
        )

        def some_heads(q: Array, k: Array, v: Array, is_retrieval: Array) -> Array:
            grouped = q.reshape(*k.shape[:3], -1, q.shape[-1])
            heads = (jnp.moveaxis(x, 2, 0) for x in (grouped, k[..., None, :], v[..., None, :]))
            # One head at a time: of several, the condition would compute both terms.
            out = jax.lax.map(
                lambda one: jax.lax.cond(one[0], full, lambda *qkv: streaming(*qkv)[0], *one[1:]),
                (is_retrieval, *heads),
            )
            return jnp.moveaxis(out, 0, 2).reshape(q.shape)

        arrays, axes = (q, k, v, layer_input), (2, 2, 2, 0)
        return by_heads(some_heads, *arrays, axes=axes, kv_heads=k.shape[2]), None

    return attend


def teacher_attention(*, implementation: Implementation = "auto") -> llama.Attend:
    """Return full attention that reports its output, for `teacher_mixed_attention` to use."""

    def attend(
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: PyTree,
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], Array]:
        out, _ = llama.attend_full(q, k, v, layer_input, implementation=implementation)
        return out, out

    return attend


def teacher_mixed_attention(
    *, sink_size: int, recent_size: int, implementation: Implementation = "auto"
) -> llama.Attend:
    """Return an attention whose full term is the teacher's output of the same layer.

    The layer input is (gates [kv_heads], teacher's output [batch, length, q_heads, head_dim]).
    Only streaming attention is computed, so nothing quadratic is differentiated.
    """

    def attend(
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: tuple[
            Float[Array, " kv_heads"], Float[Array, "batch length q_heads head_dim"]
        ],
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], None]:
        gates, full = layer_input
        streaming, _ = streaming_attention(
            q,
            k,
            v,
            sink_size=sink_size,
            recent_size=recent_size,
            softmax_scale=q.shape[-1] ** -0.5,
            implementation=implementation,
        )
        return mix(gates, full, streaming), None

    return attend
