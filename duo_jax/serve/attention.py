"""Attention of one layer: retrieval heads over the full cache, streaming heads over their ring.

The first KV heads of a layer are retrieval heads (duo_jax.heads.split). A layer's caches come in
three kinds, and one token per row takes another way through them than a chunk of tokens:

    cache                   attend_token                     attend_chunk
    full                    write, decode                    write, causal prefill
    full, blocks of "int2"  write, decode blocks and the     streaming attention over the latest 64,
                            latest 64, merge                 write, prefill over the blocks, merge
    ring                    write, decode                    streaming attention over ring and
                                                             chunk; write

A token may overwrite its slot of the ring before attention: what was there has left its window. A
chunk may not, since its first tokens still see what its last ones overwrite.

Kernels read quantised caches as they are. The tokens of a chunk see each other as the cache will
hold them, so that nothing depends on how a text is cut into chunks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.cache import KVCache, LayerCache, update
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import AnyMesh
from duo_jax.serve.votes import Voters, count_votes
from kernels import (
    Implementation,
    decode_attention,
    merge_lse,
    prefill_attention,
    pytree,
    streaming_attention,
)
from kernels.packed import BLOCK
from kernels.pages import Pages

PrefillMode = Literal["exact", "chunk"]

Queries = Float[Array, "batch length q_heads head_dim"]
NewKV = Float[Array, "batch length kv_heads head_dim"]
# Appends keys and values to one cache; attends to it with the query heads of its KV heads.
AttendPart = Callable[[Queries, NewKV, NewKV, KVCache], tuple[Queries, KVCache]]


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInput:
    """A layer's cache, and the place of the new tokens in it."""

    cache: LayerCache
    lengths: Int[Array, " batch"]  # tokens before these
    kept: Int[Array, " batch"]  # how many of those full caches hold
    num_tokens: Int[Array, " batch"]  # of these, how many count
    pages: Pages | None = None  # of paged full caches
    # The devices that share the cache (duo_jax.serve.striped).
    mesh: AnyMesh | None = dataclasses.field(default=None, metadata={"static": True})


def attend(
    q: Queries,
    k: NewKV,
    v: NewKV,
    layer_input: LayerInput,
    *,
    config: DuoConfig,
    mode: PrefillMode,
    voters: Voters = "latest",
    implementation: Implementation,
) -> tuple[Queries, LayerCache]:
    """Append keys and values to a layer's caches, and attend to them.

    Args:
      q: queries, rotated.
      k: keys, rotated.
      v: values.
      layer_input: the layer's cache, and where the tokens belong.
      config: the split model.
      mode: what streaming heads see of a chunk, see duo_jax.serve.forward.
      voters: whose attention a chunk's votes count, where the caches have any.
      implementation: attention implementation, see kernels.dispatch.

    Returns:
      The output, and the layer's cache.
    """
    if q.shape[1] == 1:
        return attend_token(q, k, v, layer_input, config=config, implementation=implementation)
    return attend_chunk(
        q,
        k,
        v,
        layer_input,
        config=config,
        mode=mode,
        voters=voters,
        implementation=implementation,
    )


def attend_token(
    q: Float[Array, "batch 1 q_heads head_dim"],
    k: Float[Array, "batch 1 kv_heads head_dim"],
    v: Float[Array, "batch 1 kv_heads head_dim"],
    layer_input: LayerInput,
    *,
    config: DuoConfig,
    implementation: Implementation,
) -> tuple[Float[Array, "batch 1 q_heads head_dim"], LayerCache]:
    """Do what `attend` does for one token per row."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    lengths, num_tokens, kept = layer_input.lengths, layer_input.num_tokens, layer_input.kept
    filled, place = lengths + num_tokens, {"lengths": lengths, "num_tokens": num_tokens}
    batch_size = q.shape[0]  # rings may have more rows (duo_jax.serve.rows)
    paged: dict[str, Any] = {"pages": layer_input.pages}

    def full(q, k, v, cache):
        cache = update.append(cache, k, v, starts=kept, num_tokens=num_tokens, **paged)
        held = kept + num_tokens
        out, _ = decode_attention(q[:, 0], cache.keys, cache.values, held, **paged, **options)
        return out[:, None], cache

    def blocks(q, k, v, cache):
        ring = update.append_token_to_ring(cache.latest, k, v, sink_size=0, **place)
        # The token's slot is not read there; the ring before it would have to be copied.
        cache = dataclasses.replace(cache, latest=ring)
        cache, q = update.append_blocks(cache, k, v, **place, **paged), q[:, 0]
        own, held = ring.first_rows(batch_size), jnp.minimum(filled, BLOCK)
        latest = decode_attention(q, own.keys, own.values, held, **options)
        older = jnp.maximum(filled - BLOCK, 0)
        before = decode_attention(q, cache.keys, cache.values, older, **paged, **options)
        return merged(latest, before)[0][:, None], cache

    def ring(q, k, v, cache):
        cache = update.append_token_to_ring(cache, k, v, sink_size=config.sink_size, **place)
        own, held = cache.first_rows(batch_size), jnp.minimum(filled, config.ring_slots)
        out, _ = decode_attention(q[:, 0], own.keys, own.values, held, **options)
        return out[:, None], cache

    out, after = by_part(q, k, v, layer_input.cache, full=full, blocks=blocks, ring=ring)
    return out.astype(q.dtype), after


def attend_chunk(
    q: Queries,
    k: NewKV,
    v: NewKV,
    layer_input: LayerInput,
    *,
    config: DuoConfig,
    mode: PrefillMode,
    voters: Voters = "latest",
    implementation: Implementation,
) -> tuple[Queries, LayerCache]:
    """Do what `attend` does for several tokens per row."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    lengths, num_tokens, kept = layer_input.lengths, layer_input.num_tokens, layer_input.kept
    sizes = {"sink_size": config.sink_size, "recent_size": config.recent_size}
    place = {"lengths": lengths, "num_tokens": num_tokens}
    paged: dict[str, Any] = {"pages": layer_input.pages}

    def full(q, k, v, cache):
        cache = update.append(cache, k, v, starts=kept, num_tokens=num_tokens, **paged)
        out, lse = prefill_attention(q, cache.keys, cache.values, kept, **paged, **options)
        if cache.votes is not None:
            cache = count_votes(cache, q, lse, kept=kept, num_tokens=num_tokens, voters=voters)
        return out, cache

    def blocks(q, k, v, cache):
        past = update.past(cache.latest, k, v, sink_size=0, **place)
        latest = streaming_attention(q, k, v, sink_size=0, recent_size=BLOCK, past=past, **options)
        ring = update.append_to_ring(cache.latest, k, v, sink_size=0, **place)
        cache = update.append_blocks(cache, k, v, **place, **paged)
        cache = dataclasses.replace(cache, latest=ring)
        older = lengths - BLOCK
        before = prefill_attention(q, cache.keys, cache.values, older, **paged, **options)
        return merged(latest, before)[0], cache

    def ring_exact(q, k, v, cache):
        after = update.append_to_ring(cache, k, v, sink_size=config.sink_size, **place)
        k, v = update.as_cached(cache, k, v)
        past = update.past(cache, k, v, sink_size=config.sink_size, **place)
        out, _ = streaming_attention(q, k, v, past=past, **sizes, **options)
        return out, after

    def ring_chunk(q, k, v, cache):
        # What is cached comes before all of the chunk: causal attention from that offset on.
        after = update.append_to_ring(cache, k, v, sink_size=config.sink_size, **place)
        buffer, held = update.ring_and_chunk(cache, k, v, **place)
        out, _ = prefill_attention(q, buffer.keys, buffer.values, held, **options)
        return out, after

    ring = ring_exact if mode == "exact" else ring_chunk
    out, cache = by_part(q, k, v, layer_input.cache, full=full, blocks=blocks, ring=ring)
    return rings_first(out.astype(q.dtype), cache)


def by_part(
    q: Queries,
    k: Float[Array, "batch _ kv_heads head_dim"],
    v: Float[Array, "batch _ kv_heads head_dim"],
    cache: LayerCache,
    *,
    full: AttendPart,
    blocks: AttendPart,
    ring: AttendPart,
) -> tuple[Float[Array, "batch length q_heads _"], LayerCache]:
    """Give each cache of a layer its heads, in its dtype; join outputs and caches."""
    parts = [(blocks if part.format == "int2" else full, part) for part in cache.full]
    if cache.streaming is not None:
        parts.append((ring, cache.streaming))
    group, first = q.shape[2] // k.shape[2], 0
    outputs, after = [], []
    for attend_part, part in parts:
        end = first + part.keys.shape[1]
        dtype = jnp.bfloat16 if part.format == "bf16" else q.dtype
        queries = q[:, :, first * group : end * group].astype(dtype)
        keys, values = (x[:, :, first:end].astype(dtype) for x in (k, v))
        out, part = attend_part(queries, keys, values, part)
        outputs.append(out)
        after.append(part)
        first = end
    streaming = None if cache.streaming is None else after.pop()
    return jnp.concatenate(outputs, axis=2), LayerCache(full=tuple(after), streaming=streaming)


def merged(
    *parts: tuple[Float[Array, "..."], Float[Array, "..."]],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Merge attention over different keys, given as outputs and log-sum-exps."""
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    return merge_lse(outs, lses)


def rings_first(out: Queries, cache: LayerCache) -> tuple[Queries, LayerCache]:
    """Write a chunk's rings before the next layer starts, by a barrier.

    Otherwise XLA's GPU compiler joins the writes to rings of the same shape in all layers, and
    keeps all their keys and values until then: 1.3 GB for Llama-3-8B in "int2", chunk 32,000.
    """
    rings = (cache.streaming, [part.latest for part in cache.full])
    out, (streaming, latest) = jax.lax.optimization_barrier((out, rings))
    parts = zip(cache.full, latest, strict=True)
    full = tuple(dataclasses.replace(part, latest=ring) for part, ring in parts)
    return out, LayerCache(full=full, streaming=streaming)
