"""Attention of one layer on a mesh: duo_jax.serve.attention, with full caches cut along the text.

Every device attends to the positions that it holds (duo_jax.cache.stripes), with all query heads of
retrieval heads; the parts are merged by their log-sum-exps. Queries travel, never the cache.
Outside, where XLA shares the products of weights, queries, keys and values are cut by heads.

One token per row. One message gathers the heads of all three, a second brings each device its own
heads' parts: with the two sums that follow o_proj and down_proj, four in a layer. Streaming heads,
whose work is small, are computed by all devices, and merged as if they were parts. So are the
latest tokens of "int2", which the first device alone counts.

A chunk. All queries attend to the stripes of every device. A device merges and keeps the outputs of
its own T / N tokens, for which it also computes the streaming heads, and the latest tokens of
"int2"; then tokens are exchanged for heads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from duo_jax.cache import LayerCache, stripes, update
from duo_jax.cache.stripes import Share
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import DATA, MODEL
from duo_jax.serve.attention import (
    LayerInput,
    NewKV,
    PrefillMode,
    Queries,
    by_part,
    merged,
    rings_first,
)
from duo_jax.serve.votes import Voters, count_votes
from kernels import (
    Implementation,
    Past,
    decode_attention,
    merge_lse,
    prefill_attention,
    streaming_attention,
)
from kernels.packed import BLOCK
from kernels.precision import accumulator
from kernels.tile_io import cdiv


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
    """Do what `duo_jax.serve.attention.attend` does, for a cache on several devices."""
    mesh, length = layer_input.mesh, q.shape[1]
    assert mesh is not None
    num = mesh.shape[MODEL]
    if length == 1:
        local = functools.partial(_attend_token, num=num, config=config)
    else:
        local = functools.partial(_attend_chunk, num=num, config=config, mode=mode, voters=voters)
        missing = -length % num  # padding, as at the end of a row
        q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    by_heads, specs = [_heads(x, num) for x in (q, k, v)], stripes.specs(layer_input)
    out, cache = jax.shard_map(
        functools.partial(local, implementation=implementation),
        mesh=mesh,
        in_specs=(*by_heads, specs),
        out_specs=(by_heads[0], specs.cache),
        check_vma=False,  # of kernels jax does not know what varies
    )(q, k, v, layer_input)
    return out[:, :length], cache


def _heads(x: Float[Array, "batch length heads head_dim"], num: int) -> PartitionSpec:
    """Return how queries, keys or values are cut, as the weights are that made them."""
    return PartitionSpec(DATA, None, None if x.shape[2] % num else MODEL)


def _attend_token(
    q: Float[Array, "batch 1 some_q_heads head_dim"],
    k: Float[Array, "batch 1 some_kv_heads head_dim"],
    v: Float[Array, "batch 1 some_kv_heads head_dim"],
    layer_input: LayerInput,
    *,
    num: int,
    config: DuoConfig,
    implementation: Implementation,
) -> tuple[Float[Array, "batch 1 some_q_heads head_dim"], LayerCache]:
    """Attend with one token per row, on one device."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    lengths, num_tokens = layer_input.lengths, layer_input.num_tokens
    place, dtype = {"lengths": lengths, "num_tokens": num_tokens}, q.dtype
    paged: dict[str, Any] = {"pages": layer_input.pages}
    share, kept = Share(device=jax.lax.axis_index(MODEL), num=num), layer_input.kept
    (q, cut), (k, _), (v, _) = _all_heads(q, k, v, config)

    def full(q, k, v, cache):
        before, after = share.held(kept), share.held(kept + num_tokens)
        cache = update.append(cache, k, v, starts=before, num_tokens=after - before, **paged)
        out, lse = decode_attention(q[:, 0], cache.keys, cache.values, after, **paged, **options)
        return _with_lse(out, lse), cache

    def blocks(q, k, v, cache):
        ring = update.append_token_to_ring(cache.latest, k, v, sink_size=0, **place)
        cache = dataclasses.replace(cache, latest=ring)
        cache = update.append_blocks(cache, k, v, **place, **paged, share=share)
        own, held = ring.first_rows(q.shape[0]), jnp.minimum(lengths + num_tokens, BLOCK)
        latest, lse = decode_attention(q[:, 0], own.keys, own.values, held, **options)
        lse = jnp.where(share.device == 0, lse, -jnp.inf)
        older = share.held(lengths + num_tokens - BLOCK)
        before = decode_attention(q[:, 0], cache.keys, cache.values, older, **paged, **options)
        return _with_lse(*merged((latest, lse), before)), cache

    def ring(q, k, v, cache):
        cache = update.append_token_to_ring(cache, k, v, sink_size=config.sink_size, **place)
        own = cache.first_rows(q.shape[0])
        held = jnp.minimum(lengths + num_tokens, config.ring_slots)
        out, lse = decode_attention(q[:, 0], own.keys, own.values, held, **options)
        return _with_lse(out, lse), cache

    both, cache = by_part(q, k, v, layer_input.cache, full=full, blocks=blocks, ring=ring)
    if cut:  # to each device its heads, of all devices
        parts = jax.lax.all_to_all(jnp.stack(jnp.split(both, num, axis=2)), MODEL, 0, 0)
    else:  # a group of one device has no one to ask
        parts = jax.lax.all_gather(both, MODEL) if num > 1 else both[None]
    return merge_lse(parts[..., :-1], parts[..., -1])[0].astype(dtype), cache


def _attend_chunk(
    q: Float[Array, "batch length some_q_heads head_dim"],
    k: Float[Array, "batch length some_kv_heads head_dim"],
    v: Float[Array, "batch length some_kv_heads head_dim"],
    layer_input: LayerInput,
    *,
    num: int,
    config: DuoConfig,
    mode: PrefillMode,
    voters: Voters,
    implementation: Implementation,
) -> tuple[Float[Array, "batch length some_q_heads head_dim"], LayerCache]:
    """Attend with a chunk of a multiple of `num` tokens, on one device."""
    options = {"softmax_scale": q.shape[-1] ** -0.5, "implementation": implementation}
    lengths, num_tokens = layer_input.lengths, layer_input.num_tokens
    sizes = {"sink_size": config.sink_size, "recent_size": config.recent_size}
    place, dtype = {"lengths": lengths, "num_tokens": num_tokens}, q.dtype
    paged: dict[str, Any] = {"pages": layer_input.pages}
    device, kept = jax.lax.axis_index(MODEL), layer_input.kept
    share, own = Share(device=device, num=num), q.shape[1] // num
    first = device * own  # the tokens from here on, `own` of them, have their outputs here
    cut = q.shape[2] < config.architecture.num_q_heads
    if cut:  # heads for tokens
        q = jax.lax.all_to_all(q, MODEL, split_axis=1, concat_axis=2, tiled=True)
    else:
        q = jax.lax.dynamic_slice_in_dim(q, first, own, axis=1)
    if k.shape[2] < config.architecture.num_kv_heads:
        both = jnp.concatenate([k, v], axis=-1)
        k, v = jnp.split(jax.lax.all_gather(both, MODEL, axis=2, tiled=True), 2, axis=-1)

    def attend_stripes(q, cache, starts):
        """Return attention to the stripes of every device in turn, for this device's tokens."""
        starts = share.since_first(starts)
        out, lse = prefill_attention(
            q, cache.keys, cache.values, starts, shares=num, **paged, **options
        )
        return _to_own_tokens(out, num), _to_own_tokens(lse, num)

    def full(q, k, v, cache):
        before, after = share.held(kept), share.held(kept + num_tokens)
        cache = update.append(
            cache,
            *(_tokens_of(share, x, kept) for x in (k, v)),
            starts=before,
            num_tokens=after - before,
            **paged,
        )
        q = jax.lax.all_gather(q, MODEL, axis=1, tiled=True)
        out, lse = merge_lse(*attend_stripes(q, cache, kept))
        if cache.votes is not None:
            lse = jax.lax.all_gather(lse, MODEL, axis=1, tiled=True)
            voted: dict[str, Any] = {"num_tokens": num_tokens, "voters": voters, "shares": num}
            cache = count_votes(cache, q, lse, kept=share.since_first(kept), **voted)
        return out, cache

    def attend_window(q, k, v, cache, **sizes):
        """Return attention to a ring and the chunk, for this device's tokens; and the ring then."""
        at = {"sink_size": sizes["sink_size"], **place}
        after = update.append_to_ring(cache, k, v, **at)
        k, v = update.as_cached(cache, k, v)
        past = _past_of(first, update.past(cache, k, v, **at), k, v)
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, own, axis=1) for x in (k, v))
        return streaming_attention(q, k, v, past=past, **sizes, **options), after

    def blocks(q, k, v, cache):
        latest, ring = attend_window(q, k, v, cache.latest, sink_size=0, recent_size=BLOCK)
        cache = update.append_blocks(cache, k, v, **place, **paged, share=share)
        cache = dataclasses.replace(cache, latest=ring)
        q = jax.lax.all_gather(q, MODEL, axis=1, tiled=True)
        older = attend_stripes(q, cache, lengths - BLOCK)
        parts = zip(latest, older, strict=True)
        return merge_lse(*(jnp.concatenate([x[None], y]) for x, y in parts))[0], cache

    def ring_exact(q, k, v, cache):
        (out, _), after = attend_window(q, k, v, cache, **sizes)
        return out, after

    def ring_chunk(q, k, v, cache):
        after = update.append_to_ring(cache, k, v, sink_size=config.sink_size, **place)
        buffer, held = update.ring_and_chunk(cache, k, v, **place)
        out, _ = prefill_attention(q, buffer.keys, buffer.values, held + first, **options)
        return out, after

    ring = ring_exact if mode == "exact" else ring_chunk
    out, cache = by_part(q, k, v, layer_input.cache, full=full, blocks=blocks, ring=ring)
    out = out.astype(dtype)
    if cut:  # tokens for heads
        out = jax.lax.all_to_all(out, MODEL, split_axis=2, concat_axis=1, tiled=True)
    else:
        out = jax.lax.all_gather(out, MODEL, axis=1, tiled=True)
    return rings_first(out, cache)


def _all_heads(q: Array, k: Array, v: Array, config: DuoConfig) -> list[tuple[Array, bool]]:
    """Return all heads of queries, keys and values, in one message; and which of them were cut."""
    wanted = (config.architecture.num_q_heads, *[config.architecture.num_kv_heads] * 2)
    cut = [x.shape[2] < heads for x, heads in zip((q, k, v), wanted, strict=True)]
    given = [x for x, is_cut in zip((q, k, v), cut, strict=True) if is_cut]
    if not given:
        return [(x, False) for x in (q, k, v)]
    ends = np.cumsum([x.shape[2] for x in given])[:-1]
    message = jax.lax.all_gather(jnp.concatenate(given, axis=2), MODEL, axis=2)
    whole = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in jnp.split(message, ends, axis=3))
    return [
        (next(whole) if is_cut else x, is_cut) for x, is_cut in zip((q, k, v), cut, strict=True)
    ]


def _with_lse(
    out: Float[Array, "batch q_heads head_dim"], lse: Float[Array, "batch q_heads"]
) -> Float[Array, "batch 1 q_heads _"]:
    """Join an output and its log-sum-exp, as one more channel, into one message."""
    wide = accumulator(out.dtype)
    both = [out.astype(wide), lse.astype(wide)[..., None]]
    return jnp.concatenate(both, axis=-1)[:, None]


def _tokens_of(
    share: Share, x: NewKV, lengths: Int[Array, " batch"]
) -> Float[Array, "batch _ kv_heads head_dim"]:
    """Return those tokens of a chunk, which follows on others, that a device holds."""
    length = x.shape[1]
    most = min(length, cdiv(length, BLOCK * share.num) * BLOCK)
    slots = share.held(lengths)[:, None] + jnp.arange(most, dtype=lengths.dtype)[None, :]
    at = jnp.minimum(share.positions(slots) - lengths[:, None], length - 1)
    return jnp.take_along_axis(x, at[:, :, None, None], axis=1)


def _to_own_tokens(x: Float[Array, "batch length ..."], num: int) -> Float[Array, "{num} ..."]:
    """Give each device what all of them have of its share of a chunk's tokens."""
    return jax.lax.all_to_all(jnp.stack(jnp.split(x, num, axis=1)), MODEL, 0, 0)


def _past_of(first: Int[Array, ""], past: Past, k: NewKV, v: NewKV) -> Past:
    """Return the past of a part of a chunk that begins at `first`, given that of the chunk."""

    def recents(before: Array, new: NewKV) -> Array:
        joined = jnp.concatenate([before, jnp.swapaxes(new, 1, 2)], axis=2)
        return jax.lax.dynamic_slice_in_dim(joined, first, before.shape[2], axis=2)

    return dataclasses.replace(
        past,
        recent_keys=recents(past.recent_keys, k),
        recent_values=recents(past.recent_values, v),
        lengths=past.lengths + first.astype(past.lengths.dtype),
    )
