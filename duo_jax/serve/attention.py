"""Attention of one layer: retrieval heads over the full cache, streaming heads over their ring.

The first KV heads of a layer are retrieval heads (duo_jax.heads.split). A cache that quantises is
read as it is by the kernels; so that nothing depends on how a text is cut into chunks, the
tokens of a chunk see each other as the cache will hold them.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from duo_jax.cache import KVCache, LayerCache, update
from duo_jax.heads.split import DuoConfig
from kernels import (
    Implementation,
    decode_attention,
    merge_lse,
    prefill_attention,
    streaming_attention,
)
from kernels.packed import BLOCK

PrefillMode = Literal["exact", "chunk"]


def attend(
    q,
    k,
    v,
    layer_input,
    *,
    config: DuoConfig,
    mode: PrefillMode,
    implementation: Implementation,
):
    """Append a chunk's keys and values to a layer's caches, and attend to them.

    Args:
      q: queries [batch, length, q_heads, head_dim], rotated.
      k: keys [batch, length, kv_heads, head_dim], rotated.
      v: values, as `k`.
      layer_input: the layer's cache, lengths before the chunk and numbers of its tokens, per row.
      config: the split model.
      mode: what streaming heads see of the chunk, see duo_jax.serve.
      implementation: of attention, see kernels.dispatch.

    Returns:
      The output [batch, length, q_heads, head_dim], and the layer's cache.
    """
    cache, lengths, num_tokens = layer_input
    dtype = q.dtype
    stored = [x.dtype for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
    if jnp.bfloat16 in stored:  # the caches of "bf16", whatever the model's dtype
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    outputs, full, streaming = [], [], None

    def heads(first: int, end: int | None = None):
        """Return queries, keys and values of some KV heads."""
        group = config.architecture.q_per_kv
        queries = slice(first * group, None if end is None else end * group)
        return q[:, :, queries], k[:, :, first:end], v[:, :, first:end]

    first = 0
    for part in cache.full:
        end = first + part.keys.shape[1]
        attend_part = _attend_full if part.latest is None else _attend_blocks
        out, part = attend_part(
            *heads(first, end), part, lengths, num_tokens, implementation=implementation
        )
        outputs.append(out)
        full.append(part)
        first = end
    if cache.streaming is not None:
        out, streaming = _attend_streaming(
            *heads(first),
            cache.streaming,
            lengths,
            num_tokens,
            config=config,
            mode=mode,
            implementation=implementation,
        )
        outputs.append(out)
    out = jnp.concatenate(outputs, axis=2).astype(dtype)
    return _rings_first(out, LayerCache(full=tuple(full), streaming=streaming))


def _rings_first(out, cache: LayerCache):
    """Have the rings of a chunk written before the next layer begins.

    XLA's GPU compiler would join the writing of rings of the same shape, of whatever layers, and
    keep all their keys and values until then: 1.3 GB of Llama-3-8B in "int2", chunk 32,000.
    """
    if out.shape[1] == 1:
        return out, cache
    rings = (cache.streaming, [part.latest for part in cache.full])
    out, (streaming, latest) = jax.lax.optimization_barrier((out, rings))
    parts = zip(cache.full, latest, strict=True)
    full = tuple(dataclasses.replace(part, latest=ring) for part, ring in parts)
    return out, LayerCache(full=full, streaming=streaming)


def _attend_full(q, k, v, cache: KVCache, lengths, num_tokens, *, implementation: Implementation):
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    cache = update.append(cache, k, v, starts=lengths, num_tokens=num_tokens)
    if q.shape[1] == 1:
        filled = lengths + num_tokens
        out, _ = decode_attention(q[:, 0], cache.keys, cache.values, filled, **options)
        return out[:, None], cache
    out, _ = prefill_attention(q, cache.keys, cache.values, lengths, **options)
    return out, cache


def _attend_blocks(q, k, v, cache: KVCache, lengths, num_tokens, *, implementation: Implementation):
    """Attend to the latest 64 tokens as they are, to those before them as their codes."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    append = functools.partial(
        update.append_in_blocks, cache, k, v, lengths=lengths, num_tokens=num_tokens
    )
    if q.shape[1] == 1:
        cache, q = append(), q[:, 0]
        filled, ring = lengths + num_tokens, cache.latest
        latest = decode_attention(q, ring.keys, ring.values, jnp.minimum(filled, BLOCK), **options)
        older = jnp.maximum(filled - BLOCK, 0)
        before = decode_attention(q, cache.keys, cache.values, older, **options)
    else:
        past = update.past(cache.latest, k, v, lengths=lengths, num_tokens=num_tokens, sink_size=0)
        latest = streaming_attention(q, k, v, sink_size=0, recent_size=BLOCK, past=past, **options)
        cache = append()
        before = prefill_attention(q, cache.keys, cache.values, lengths - BLOCK, **options)
    outs, lses = (jnp.stack(parts) for parts in zip(latest, before, strict=True))
    out, _ = merge_lse(outs, lses)
    return (out[:, None] if out.ndim == 3 else out), cache


def _attend_streaming(
    q,
    k,
    v,
    cache: KVCache,
    lengths,
    num_tokens,
    *,
    config: DuoConfig,
    mode: PrefillMode,
    implementation: Implementation,
):
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    sink_size = config.sink_size
    place = {"lengths": lengths, "num_tokens": num_tokens, "sink_size": sink_size}
    if q.shape[1] == 1:
        cache = update.append_to_ring(cache, k, v, **place)
        filled = jnp.minimum(lengths + num_tokens, config.ring_slots)
        out, _ = decode_attention(q[:, 0], cache.keys, cache.values, filled, **options)
        return out[:, None], cache
    new_cache = update.append_to_ring(cache, k, v, **place)
    k, v = update.as_cached(cache, k, v)
    if mode == "exact":
        past = update.past(cache, k, v, **place)
        out, _ = streaming_attention(
            q, k, v, sink_size=sink_size, recent_size=config.recent_size, past=past, **options
        )
        return out, new_cache
    # To a causal chunk all cached tokens are past, in whatever order: lay it behind them.
    filled = jnp.minimum(lengths, config.ring_slots)
    room = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, q.shape[1]), (0, 0))),
        update.unpacked(cache, k.dtype),
    )
    laid_out = update.append(room, k, v, starts=filled, num_tokens=num_tokens)
    out, _ = prefill_attention(q, laid_out.keys, laid_out.values, filled, **options)
    return out, new_cache
