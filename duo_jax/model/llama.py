"""The Llama family as functional Linen modules: parameters in, activations out.

Layers are scanned over stacked parameters. Attention is pluggable: callers pass an `Attend`
function, which gets one extra input and returns one extra result per layer (gates, the outputs of
another stream, a cache), stacked over layers.

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

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from duo_jax.model import rope
from duo_jax.model.config import ModelConfig
from duo_jax.model.layers import (
    Attend,
    DecoderLayer,
    Linear,
    Residual,
    RMSNorm,
    attend_full,
)

Params = Mapping[str, Any]


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
      layer_inputs: tree whose leaves have a leading axis of num_layers; `attend` gets layer l's
        slice as `layer_input`.
      total_length: number of real tokens, where `tokens` is padded; only dynamic rope scaling
        reads it.
      remat: keep only each layer's input for the backward pass and recompute the rest.

    Returns:
      The residual stream after the last layer, and the extra results of `attend`, stacked over
      layers.
    """
    model = Llama(architecture, attend=attend, remat=remat)
    return _apply(model, params, tokens, layer_inputs, total_length, method=Llama.hidden_states)


def final_norm(
    architecture: ModelConfig, params: Params, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length embed"]:
    """Apply the norm in front of the output projection."""
    return _apply(Llama(architecture), params, x, method=Llama.final_norm)


def logits(
    architecture: ModelConfig, params: Params, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length vocab"]:
    """Turn residual streams into next-token logits (final norm and output projection)."""
    return _apply(Llama(architecture), params, x, method=Llama.logits)


def init_params(
    architecture: ModelConfig, rng_key: Key[Array, ""], dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Draw random parameters (norms at 1, biases at 0, linears normal with 1/sqrt(fan_in))."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Llama(architecture, param_dtype=dtype).init(rng_key, tokens, None, None)["params"]
    return nn.unbox(params)


def _apply(model: "Llama", params: Params, *args: Any, method: Callable[..., Any]) -> Any:
    return model.apply({"params": params}, *args, method=method)


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
        in_axes: Any = (nn.broadcast, 0)  # flax annotates an int
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=architecture.num_layers,
        )(architecture, attend=self.attend, param_dtype=dtype)
        self.norm = RMSNorm(architecture.norm_eps, dtype)
        if not architecture.tie_embeddings:
            self.lm_head = Linear(
                (architecture.embed_size,), (architecture.vocab_size,), param_dtype=dtype
            )

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        layer_inputs: PyTree,
        total_length: Int[Array, ""] | int | None,
    ) -> Float[Array, "batch length vocab"]:
        x, _ = self.hidden_states(tokens, layer_inputs, total_length)
        return self.logits(x)

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        layer_inputs: PyTree,
        total_length: Int[Array, ""] | int | None,
    ) -> tuple[Residual, PyTree]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        cos_sin = rope.rotation(self.architecture, positions, total_length=total_length)
        return self.layers(self.embed_tokens.embedding[tokens], cos_sin, layer_inputs)

    def final_norm(self, x: Residual) -> Residual:
        return self.norm(x)

    def logits(self, x: Residual) -> Float[Array, "batch length vocab"]:
        x = self.norm(x)
        if self.architecture.tie_embeddings:
            return jnp.einsum("btd,vd->btv", x, self.embed_tokens.embedding)
        return self.lm_head(x)
