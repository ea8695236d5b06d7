"""Prefill and decode of a split model: (params, cache, tokens) -> (logits, cache).

    cache = init_cache(config, batch_size=1, max_len=4096)
    logits, cache = prefill(config, params, cache, tokens, num_tokens)   # any number of chunks
    logits, cache = decode(config, params, cache, next_tokens)           # one token per row

`config` is static; jit, shard or vmap the functions as you like, and donate the cache: it is
updated in place. Parameters are in serving form (duo_jax.heads.split). Rows may have different
lengths; each row's tokens are appended to what its cache holds.

Prefill has two modes for streaming heads (DuoAttention, section 2.3, and its public code):

    "exact"  every token gets the streaming mask; nothing depends on how a text is cut into chunks
    "chunk"  a token sees the cached sinks and recent tokens, and its own chunk up to itself

Decoding is the same for both.
"""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.cache import Cache, LayerCache
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import replicated
from duo_jax.model import llama, rope
from duo_jax.model.llama import Params
from duo_jax.serve import striped
from duo_jax.serve.attention import LayerInput, PrefillMode, attend
from duo_jax.serve.votes import Voters
from kernels import Implementation


def prefill(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch length"],
    num_tokens: Int[Array, " batch"],
    *,
    mode: PrefillMode = "exact",
    total_lengths: Int[Array, " batch"] | None = None,
    voters: Voters = "latest",
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Append a chunk of tokens to every row.

    Args:
      config: the split model.
      params: its parameters.
      cache: the cache so far, with room for the chunk in every row.
      tokens: the chunk; row b has num_tokens[b] tokens, the rest is padding.
      num_tokens: 0 to length, per row.
      mode: what streaming heads see of the chunk.
      total_lengths: tokens per row once the whole prompt is read, of which this chunk may be a
        part; only "dynamic" rope scaling reads it. Default: the length after this chunk.
      voters: whose attention counts as votes, where the caches have any (duo_jax.serve.votes).
      implementation: attention implementation, see kernels.dispatch.

    Returns:
      Logits after each row's last token (undefined for a row of 0 tokens), and the cache.
    """
    x, cache = hidden_states(
        config,
        params,
        cache,
        tokens,
        num_tokens,
        mode=mode,
        total_lengths=total_lengths,
        voters=voters,
        implementation=implementation,
    )
    last = jnp.clip(num_tokens - 1, 0, tokens.shape[1] - 1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return replicated(logits(config, params, x)[:, 0], cache.mesh), cache


def decode(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"] | None = None,
    *,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Append one token to every row, and return the logits after it.

    Args:
      config: the split model.
      params: its parameters.
      cache: the cache so far.
      tokens: one per row.
      active: rows that get their token; the others keep their cache, and their logits are
        undefined. Default: all.
      implementation: attention implementation, see kernels.dispatch.
    """
    if active is None:
        active = jnp.ones(tokens.shape, bool)
    return prefill(
        config,
        params,
        cache,
        tokens[:, None],
        active.astype(jnp.int32),
        implementation=implementation,
    )


def hidden_states(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch length"],
    num_tokens: Int[Array, " batch"],
    *,
    mode: PrefillMode = "exact",
    total_lengths: Int[Array, " batch"] | None = None,
    voters: Voters = "latest",
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "batch length embed"], Cache]:
    """Append a chunk as `prefill` does, but return the residual stream at all its tokens."""
    if mode not in get_args(PrefillMode):
        raise ValueError(f"{mode=} is not one of {', '.join(get_args(PrefillMode))}")
    lengths = cache.lengths
    positions = lengths[:, None] + jnp.arange(tokens.shape[1], dtype=lengths.dtype)[None, :]
    if total_lengths is None:
        total_lengths = lengths + num_tokens
    cos_sin = rope.rotation(config.architecture, positions, total_length=total_lengths)
    x = replicated(params["embed_tokens"]["embedding"][tokens], cache.mesh)
    layers = []
    for layer_params, layer_cache in zip(params["layers"], cache.layers, strict=True):
        layer_input = LayerInput(
            cache=layer_cache,
            lengths=lengths,
            kept=cache.kept,
            num_tokens=num_tokens,
            pages=cache.pages,
            mesh=cache.mesh,
        )
        x, layer_cache = _layer(
            config,
            layer_params,
            x,
            cos_sin,
            layer_input,
            mode=mode,
            voters=voters,
            implementation=implementation,
        )
        layers.append(layer_cache)
    after = {"lengths": lengths + num_tokens, "kept": cache.kept + num_tokens}
    return x, dataclasses.replace(cache, layers=tuple(layers), **after)


# A program of its own, so that layers whose heads are split alike are traced once.
@functools.partial(jax.jit, static_argnames=("config", "mode", "voters", "implementation"))
def _layer(
    config: DuoConfig,
    params: Params,
    x: Float[Array, "batch length embed"],
    cos_sin: rope.CosSin,
    layer_input: LayerInput,
    *,
    mode: PrefillMode,
    voters: Voters,
    implementation: Implementation,
) -> tuple[Float[Array, "batch length embed"], LayerCache]:
    """Apply one layer, whose number of retrieval heads is that of its cache."""
    attend_layer = functools.partial(
        attend if layer_input.mesh is None else striped.attend,
        config=config,
        mode=mode,
        voters=voters,
        implementation=implementation,
    )
    layer = llama.DecoderLayer(config.architecture, attend=attend_layer)
    result: Any = layer.apply({"params": params}, x, cos_sin, layer_input)
    x, layer_cache = result
    return replicated(x, layer_input.mesh), layer_cache


def logits(
    config: DuoConfig, params: Params, x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length vocab"]:
    """Turn residual streams into next-token logits (final norm and output projection)."""
    ends = {name: part for name, part in params.items() if name != "layers"}
    return llama.logits(config.architecture, ends, x)
