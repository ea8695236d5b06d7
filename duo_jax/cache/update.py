"""Writing tokens into the two KV caches, and laying out the past that a chunk is shown.

Only small windows of slots are read and written, so a donated cache is updated in place. Keys and
values come as [batch, length, kv_heads, head_dim], as the projections make them, and are turned
into what the cache holds (duo_jax.cache.state).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from duo_jax.cache.pages import write_to_pages
from duo_jax.cache.ring import ring_position, ring_slot
from duo_jax.cache.state import KVCache
from duo_jax.cache.stripes import ALL, Share
from kernels import Past, packed
from kernels.packed import BLOCK, Packed
from kernels.pages import Pages
from kernels.tile_io import cdiv

NewKV = Float[Array, "batch length kv_heads head_dim"]
OneKV = Float[Array, "batch 1 kv_heads head_dim"]
Slots = Float[Array, "batch kv_heads _ head_dim"]
PerRow = Int[Array, " batch"]


def append(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    starts: PerRow,
    num_tokens: PerRow,
    pages: Pages | None = None,
) -> KVCache:
    """Write row b's first `num_tokens[b]` keys and values into slots starts[b], starts[b] + 1, ...

    Slots past the end are dropped. `pages` is the table of a paged cache.
    """
    new = _like(cache, keys, values)
    return jax.tree.map(lambda old, new: _write(old, new, starts, num_tokens, pages), cache, new)


def append_token_to_ring(
    cache: KVCache,
    keys: OneKV,
    values: OneKV,
    *,
    lengths: PerRow,
    num_tokens: PerRow,
    sink_size: int,
) -> KVCache:
    """Write one token per row into its slot of the ring.

    Args:
      cache: sinks and ring; it may have more rows, of which the first ones get tokens.
      keys: keys of the tokens, rotated.
      values: values of the tokens.
      lengths: tokens before these.
      num_tokens: 0 or 1 per row.
      sink_size: number of the cache's slots that are sinks.
    """
    starts = ring_slot(lengths, sink_size=sink_size, slots=cache.slots)
    batch_size = lengths.shape[0]
    if cache.rows == batch_size:
        return append(cache, keys, values, starts=starts, num_tokens=num_tokens)
    # Each row is a page: slots alone are written, and the other rows stay where they are.
    new = [keys, values, starts, num_tokens, jnp.arange(batch_size)[:, None]]
    if batch_size == 1:
        # XLA merges the write of a single token with what reads it, and then copies all rings.
        # A second one, which is dropped, keeps it apart.
        new = [jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]) for x in new]
    keys, values, starts, num_tokens, rows = new
    return append(cache, keys, values, starts=starts, num_tokens=num_tokens, pages=rows)


def append_to_ring(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: PerRow,
    num_tokens: PerRow,
    sink_size: int,
) -> KVCache:
    """Write a chunk's sinks, and the latest of its other tokens that the ring has room for.

    Every slot takes the chunk's token that it must hold after the chunk, if it is one of the
    chunk's; the other slots keep their content.

    Args:
      cache: sinks and ring.
      keys: keys of the chunk, rotated.
      values: values of the chunk.
      lengths: tokens before the chunk.
      num_tokens: tokens of the chunk that count, per row.
      sink_size: number of the cache's slots that are sinks.
    """
    lengths, ends = lengths[:, None], (lengths + num_tokens)[:, None]
    slot = jnp.arange(cache.slots, dtype=lengths.dtype)[None, :]
    position = ring_position(ends, sink_size=sink_size, slots=cache.slots)
    fresh = (position >= jnp.maximum(lengths, jnp.minimum(slot, sink_size))) & (position < ends)
    source = jnp.clip(position - lengths, 0, keys.shape[1] - 1)

    def take_in(
        old: Shaped[Array, "batch kv_heads slots _"], new: Shaped[Array, "batch kv_heads length _"]
    ) -> Shaped[Array, "batch kv_heads slots _"]:
        new = jnp.take_along_axis(new, source[:, None, :, None], axis=2)
        return jnp.where(fresh[:, None, :, None], new, old)

    return jax.tree.map(take_in, cache, _like(cache, keys, values))


def append_blocks(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: PerRow,
    num_tokens: PerRow,
    pages: Pages | None = None,
    share: Share = ALL,
) -> KVCache:
    """Pack the blocks of 64 tokens that a chunk completes; the ring `latest` stays as it was.

    Args:
      cache: packed blocks, and the ring of the latest tokens before the chunk.
      keys: keys of the chunk, rotated.
      values: values of the chunk.
      lengths: tokens before the chunk.
      num_tokens: tokens of the chunk that count, per row.
      pages: the table of a paged cache.
      share: of these blocks, those that are packed.
    """
    assert cache.latest is not None
    begun = lengths % BLOCK  # tokens of an unfinished block; they are the ring's first ones
    first = lengths - begun
    starts = share.held(first)
    packed_tokens = share.held(first + (begun + num_tokens) // BLOCK * BLOCK) - starts
    most_blocks = cdiv(BLOCK - 1 + keys.shape[1], BLOCK)
    window = jnp.arange(cdiv(most_blocks, share.num) * BLOCK, dtype=begun.dtype)[None, :]
    at, end = share.positions(starts[:, None] + window) - first[:, None], begun[:, None]
    source = jnp.where(at < end, at, BLOCK + at - end)
    source = jnp.minimum(source, BLOCK + keys.shape[1] - 1)

    def pack_in(cached: Array | Packed, ring: Array, new: NewKV) -> Packed:
        assert isinstance(cached, Packed)
        joined = jnp.concatenate([ring, jnp.swapaxes(new, 1, 2)], axis=2)
        joined = jnp.take_along_axis(joined, source[:, None, :, None], axis=2)

        def write(old: Array, new: Array) -> Array:
            tokens = cached.shape[2] // old.shape[2]
            return _write(old, new, starts // tokens, packed_tokens // tokens, pages)

        return jax.tree.map(write, cached, packed.pack(joined, cached.layout))

    ring_keys, ring_values = unpacked(cache.latest.first_rows(keys.shape[0]), keys.dtype)
    return dataclasses.replace(
        cache,
        keys=pack_in(cache.keys, ring_keys, keys),
        values=pack_in(cache.values, ring_values, values),
    )


def past(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: PerRow,
    num_tokens: PerRow,
    sink_size: int,
) -> Past:
    """Lay out what the streaming heads of a chunk need of the tokens before it.

    The sinks include those of the chunk itself; the recent tokens are put in order of position.
    Takes the cache as it was before the chunk.
    """
    new_keys, new_values = unpacked(_like(cache, keys, values), keys.dtype)
    old_keys, old_values = unpacked(cache, keys.dtype)
    recent_size = cache.slots - sink_size
    # Index i gets position lengths - recent_size + i. Positions of sinks are masked there: any
    # slot will do for them.
    positions = lengths[:, None] + jnp.arange(-recent_size, 0, dtype=lengths.dtype)[None, :]
    slots = ring_slot(jnp.maximum(positions, sink_size), sink_size=sink_size, slots=cache.slots)

    def sinks(old: Slots, new: Slots) -> Slots:
        return _write(old[:, :, :sink_size], new, lengths, num_tokens)

    def recents(old: Slots) -> Slots:
        return jnp.take_along_axis(old, slots[:, None, :, None], axis=2)

    return Past(
        sink_keys=sinks(old_keys, new_keys),
        sink_values=sinks(old_values, new_values),
        recent_keys=recents(old_keys),
        recent_values=recents(old_values),
        lengths=lengths,
    )


def ring_and_chunk(
    cache: KVCache, keys: NewKV, values: NewKV, *, lengths: PerRow, num_tokens: PerRow
) -> tuple[KVCache, PerRow]:
    """Return a ring, as it was before a chunk, with the chunk behind its filled slots.

    For tokens that see all that is cached, in whatever order, and their own chunk causally. Also
    returns how many slots were filled.
    """
    keys, values = as_cached(cache, keys, values)
    held = jnp.minimum(lengths, cache.slots)
    room = ((0, 0), (0, 0), (0, keys.shape[1]), (0, 0))
    ring_keys, ring_values = (jnp.pad(x, room) for x in unpacked(cache, keys.dtype))
    buffer = KVCache(keys=ring_keys, values=ring_values)
    return append(buffer, keys, values, starts=held, num_tokens=num_tokens), held


def as_cached(cache: KVCache, keys: NewKV, values: NewKV) -> tuple[NewKV, NewKV]:
    """Return keys and values as they will be read from the cache: rounded if it quantises."""
    if not isinstance(cache.keys, Packed):
        return keys, values
    new_keys, new_values = unpacked(_like(cache, keys, values), keys.dtype)
    return jnp.swapaxes(new_keys, 1, 2), jnp.swapaxes(new_values, 1, 2)


def unpacked(cache: KVCache, dtype: DTypeLike) -> tuple[Slots, Slots]:
    """Return a cache's keys and values, in `dtype` if it quantises them."""

    def numbers(x: Slots | Packed) -> Slots:
        return packed.unpack(x, dtype) if isinstance(x, Packed) else x

    return numbers(cache.keys), numbers(cache.values)


def _like(cache: KVCache, keys: NewKV, values: NewKV) -> KVCache:
    """Return a chunk in the cache's layout and format."""

    def stored(cached: Slots | Packed, new: NewKV) -> Slots | Packed:
        new = jnp.swapaxes(new, 1, 2)
        return packed.pack(new, cached.layout) if isinstance(cached, Packed) else new

    votes = cache.votes
    if votes is not None:
        batch, length, heads, _ = keys.shape
        votes = jnp.zeros((batch, heads, length, 1), votes.dtype)
    return dataclasses.replace(
        cache, keys=stored(cache.keys, keys), values=stored(cache.values, values), votes=votes
    )


def _write(
    buffer: Shaped[Array, "rows kv_heads slots _"],
    new: Shaped[Array, "batch kv_heads length _"],
    starts: PerRow,
    num_tokens: PerRow,
    pages: Pages | None = None,
) -> Shaped[Array, "rows kv_heads slots _"]:
    """Write each row's first tokens from its start on, reading and writing only that window."""
    if pages is not None:
        return write_to_pages(buffer, new, starts, num_tokens, pages)
    slots, length = buffer.shape[2], new.shape[2]
    window = min(length, slots)

    def write_row(buffer, new, start, num_tokens):
        at = jnp.clip(start, 0, slots - window)
        source = jnp.arange(window, dtype=at.dtype) - (start - at)
        fresh = (source >= 0) & (source < num_tokens)
        new = jnp.take(new, jnp.clip(source, 0, length - 1), axis=1)
        old = jax.lax.dynamic_slice_in_dim(buffer, at, window, axis=1)
        new = jnp.where(fresh[None, :, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, at, axis=1)

    return jax.vmap(write_row)(buffer, new, starts, num_tokens)
