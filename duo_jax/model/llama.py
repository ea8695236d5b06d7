"""The Llama family as functional Linen modules: parameters in, activations out.

Layers are scanned over stacked parameters. What a layer's attention does with its queries, keys
and values is not the model's business: it is given as an `Attend` function, with one extra input
and one extra result per layer (gates, another stream's outputs, a cache), stacked over layers.

Parameters are a plain nested dict; every leaf below "layers" has a leading axis of num_layers:

    embed_tokens/embedding                      [vocab, embed]
    layers/input_layernorm/scale                [layers, embed]
    layers/self_attn/{q,k,v}_proj/kernel        [layers, embed, heads, head_dim]   (bias [layers, heads, head_dim])
    layers/self_attn/{q,k}_norm/scale           [layers, head_dim]                 (Qwen3)
    layers/self_attn/o_proj/kernel              [layers, q_heads, head_dim, embed] (bias [layers, embed])
    layers/post_attention_layernorm/scale       [layers, embed]
    layers/mlp/{gate,up}_proj/kernel            [layers, embed, mlp]               (bias [layers, mlp])
    layers/mlp/down_proj/kernel                 [layers, mlp, embed]               (bias [layers, embed])
    norm/scale                                  [embed]
    lm_head/kernel                              [embed, vocab]                     (absent if tied)

Activations have the dtype of the parameters; norms, rotation and softmax compute in float32. In
serving form (duo_jax.heads.split) the kernels of a layer may be quantised (duo_jax.model.quantised_weights).
"""  # noqa: E501

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from duo_jax.model import rope
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_linear import product
from duo_jax.model.quantised_weights import QuantisedKernel
from kernels import Implementation, full_attention
from kernels.precision import accumulator

Params = Mapping[str, Any]


@runtime_checkable
class Attend(Protocol):
    """What a layer's attention does once queries, keys and values are projected and rotated."""

    def __call__(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: PyTree,
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], PyTree]:
        """Return the attention output before o_proj, and whatever the layer reports."""
        ...


def attend_full(q, k, v, layer_input, *, implementation: Implementation = "auto"):
    """Attend causally with every head: the model as published."""
    del layer_input
    out = full_attention(q, k, v, softmax_scale=q.shape[-1] ** -0.5, implementation=implementation)
    return out, None


def hidden_states(
    architecture: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    *,
    attend: Attend = attend_full,
    layer_inputs: PyTree = None,
    total_length: Int[Array, ""] | int | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "batch length embed"], PyTree]:
    """Run all layers, up to but without the final norm.

    Sequences start at position 0. Attention is causal, so tokens to the right of a row's end
    change nothing before it.

    Args:
      architecture: the model.
      params: its parameters (see the module's docstring).
      tokens: token ids.
      attend: the attention of every layer.
      layer_inputs: tree whose leaves have a leading axis of num_layers; layer l's slice is given
        to `attend` as `layer_input`.
      total_length: real tokens, where `tokens` is padded; only dynamic rope scaling reads it.
      remat: keep only each layer's input for the backward pass and recompute the rest.

    Returns:
      The residual stream after the last layer, and what `attend` reported, stacked over layers.
    """
    return Llama(architecture, attend=attend, remat=remat).apply(
        {"params": params}, tokens, layer_inputs, total_length, method=Llama.hidden_states
    )


def final_norm(
    architecture: ModelConfig, params: Params, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length embed"]:
    """Apply the norm in front of the output projection."""
    return Llama(architecture).apply({"params": params}, x, method=Llama.final_norm)


def logits(
    architecture: ModelConfig, params: Params, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length vocab"]:
    """Turn residual streams into next-token logits (final norm and output projection)."""
    return Llama(architecture).apply({"params": params}, x, method=Llama.logits)


def init_params(
    architecture: ModelConfig, rng_key: Key[Array, ""], dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Draw random parameters (norms at 1, biases at 0, linears normal with 1/sqrt(fan_in))."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Llama(architecture, param_dtype=dtype).init(rng_key, tokens, None, None)["params"]
    return nn.unbox(params)


class Llama(nn.Module):
    """Embedding, scanned decoder layers, final norm and output projection."""

    architecture: ModelConfig
    attend: Attend = attend_full
    remat: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):
        architecture, dtype = self.architecture, self.param_dtype
        self.embed_tokens = nn.Embed(
            architecture.vocab_size, architecture.embed_size, param_dtype=dtype, name="embed_tokens"
        )
        layer = nn.remat(DecoderLayer, prevent_cse=False) if self.remat else DecoderLayer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=architecture.num_layers,
        )(architecture, attend=self.attend, param_dtype=dtype)
        self.norm = RMSNorm(architecture.norm_eps, dtype)
        if not architecture.tie_embeddings:
            self.lm_head = Linear(
                (architecture.embed_size,), (architecture.vocab_size,), param_dtype=dtype
            )

    def __call__(self, tokens, layer_inputs, total_length):
        x, _ = self.hidden_states(tokens, layer_inputs, total_length)
        return self.logits(x)

    def hidden_states(self, tokens, layer_inputs, total_length):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        cos_sin = rope.rotation(self.architecture, positions, total_length=total_length)
        return self.layers(self.embed_tokens.embedding[tokens], cos_sin, layer_inputs)

    def final_norm(self, x):
        return self.norm(x)

    def logits(self, x):
        x = self.norm(x)
        if self.architecture.tie_embeddings:
            return jnp.einsum("btd,vd->btv", x, self.embed_tokens.embedding)
        return self.lm_head(x)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    architecture: ModelConfig
    attend: Attend
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, cos_sin, layer_input):
        architecture, dtype = self.architecture, self.param_dtype
        normed = RMSNorm(architecture.norm_eps, dtype, name="input_layernorm")(x)
        attention = Attention(architecture, self.attend, dtype, name="self_attn")
        out, layer_output = attention(normed, cos_sin, layer_input)
        x = x + out
        normed = RMSNorm(architecture.norm_eps, dtype, name="post_attention_layernorm")(x)
        return x + MLP(architecture, dtype, name="mlp")(normed), layer_output


class Attention(nn.Module):
    """Project, normalise (Qwen3), rotate, attend, project back."""

    architecture: ModelConfig
    attend: Attend
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, cos_sin, layer_input):
        architecture, dtype = self.architecture, self.param_dtype

        def project(name: str, heads: int):
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
    def __call__(self, x):
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
    def __call__(self, x):
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
    def __call__(self, x):
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
