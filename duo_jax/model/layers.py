"""The layers of the Llama family: attention, MLP, norm and linear maps, as Linen modules."""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from duo_jax.model import rope
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_linear import product
from duo_jax.model.quantised_weights import QuantisedKernel
from kernels import Implementation, full_attention
from kernels.precision import accumulator

Residual = Float[Array, "batch length embed"]


@runtime_checkable
class Attend(Protocol):
    """Attention of a layer, after queries, keys and values are projected and rotated."""

    def __call__(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: PyTree,
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], PyTree]:
        """Return the attention output before o_proj, and the layer's extra result."""
        ...


def attend_full(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    layer_input: PyTree,
    *,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "batch length q_heads head_dim"], None]:
    """Attend causally with every head: the model as published."""
    del layer_input
    out = full_attention(q, k, v, softmax_scale=q.shape[-1] ** -0.5, implementation=implementation)
    return out, None


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    architecture: ModelConfig
    attend: Attend
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Residual, cos_sin: rope.CosSin, layer_input: PyTree
    ) -> tuple[Residual, PyTree]:
        architecture, dtype = self.architecture, self.param_dtype
        normed = RMSNorm(architecture.norm_eps, dtype, name="input_layernorm")(x)
        attention = Attention(architecture, self.attend, dtype, name="self_attn")
        out, layer_output = attention(normed, cos_sin, layer_input)
        # Added once: XLA would keep `out` and add it again for each of the two uses.
        x = jax.lax.optimization_barrier(x + out)
        normed = RMSNorm(architecture.norm_eps, dtype, name="post_attention_layernorm")(x)
        return x + MLP(architecture, dtype, name="mlp")(normed), layer_output


class Attention(nn.Module):
    """Project, normalise (Qwen3), rotate, attend, project back."""

    architecture: ModelConfig
    attend: Attend
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Residual, cos_sin: rope.CosSin, layer_input: PyTree
    ) -> tuple[Residual, PyTree]:
        architecture, dtype = self.architecture, self.param_dtype

        def project(name: str, heads: int) -> Float[Array, "batch length heads head_dim"]:
            shape = (heads, architecture.head_dim)
            linear = Linear(
                (architecture.embed_size,), shape, architecture.qkv_bias, dtype, name=name
            )
            return linear(x)

        q = project("q_proj", architecture.num_q_heads)
        k = project("k_proj", architecture.num_kv_heads)
        v = project("v_proj", architecture.num_kv_heads)
        if architecture.qk_norm:
            q = RMSNorm(architecture.norm_eps, dtype, name="q_norm")(q)
            k = RMSNorm(architecture.norm_eps, dtype, name="k_norm")(k)
        with jax.named_scope("attend"):
            q, k = rope.rotate(q, *cos_sin), rope.rotate(k, *cos_sin)
            out, layer_output = self.attend(q, k, v, layer_input)
        heads = (architecture.num_q_heads, architecture.head_dim)
        o_proj = Linear(
            heads, (architecture.embed_size,), architecture.o_bias, dtype, name="o_proj"
        )
        return o_proj(out), layer_output


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    architecture: ModelConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Residual) -> Residual:
        architecture = self.architecture
        embed, mlp = (architecture.embed_size,), (architecture.mlp_size,)
        gate = Linear(embed, mlp, architecture.mlp_bias, self.param_dtype, name="gate_proj")(x)
        up = Linear(embed, mlp, architecture.mlp_bias, self.param_dtype, name="up_proj")(x)
        down = Linear(mlp, embed, architecture.mlp_bias, self.param_dtype, name="down_proj")
        return down(jax.nn.silu(gate) * up)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, normalised in float32."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*axes channels"]) -> Float[Array, "*axes channels"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(accumulator(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class Linear(nn.Module):
    """A linear map between axes that keep their meaning, such as embed -> (heads, head_dim)."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*other_axes"]:
        def init(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) / math.sqrt(math.prod(self.in_shape))

        wide = accumulator(x.dtype)
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, QuantisedKernel):
            out = product(x, kernel, inputs=len(self.in_shape), wide=wide)
            if not self.use_bias:
                return out.astype(x.dtype)
        else:
            kernel = self.param("kernel", init, self.in_shape + self.out_shape, self.param_dtype)
            contracted = tuple(range(x.ndim - len(self.in_shape), x.ndim))
            dimensions = ((contracted, tuple(range(len(self.in_shape)))), ((), ()))
            if not self.use_bias:
                return jax.lax.dot_general(x, kernel, dimensions)
            out = jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=wide)
        # The product is rounded once, after the bias.
        bias = self.param("bias", nn.initializers.zeros, self.out_shape, self.param_dtype)
        bias = jnp.expand_dims(bias.astype(wide), range(out.ndim - bias.ndim))
        return (out + bias).astype(x.dtype)
