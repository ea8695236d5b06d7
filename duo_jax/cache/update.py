"""How tokens enter the two KV caches, and what a chunk is shown of the tokens before it.

Only small windows of slots are read and written, so a donated cache is updated in place. Keys and
values come as [batch, length, kv_heads, head_dim], as the projections make them, and are turned
into what the cache holds (duo_jax.cache).
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from duo_jax.cache import KVCache
from kernels import Past, packed
from kernels.packed import BLOCK, Packed

NewKV = Float[Array, "batch length kv_heads head_dim"]


def append(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    starts: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
) -> KVCache:
    """Write row b's first `num_tokens[b]` keys and values into slots starts[b], starts[b] + 1, ...

    Slots past the end are dropped.
    """
    new = _like(cache, keys, values)
    return jax.tree.map(lambda old, new: _write(old, new, starts, num_tokens), cache, new)


def append_to_ring(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    sink_size: int,
) -> KVCache:
    """Take in a chunk: its sinks, and the latest of its other tokens that the ring has room for.

    Args:
      cache: sinks and ring.
      keys: keys of the chunk, rotated.
      values: values of the chunk.
      lengths: tokens before the chunk.
      num_tokens: tokens of the chunk that count, per row.
      sink_size: how many of the cache's slots are sinks.
    """
    slots = cache.slots
    if keys.shape[1] == 1:
        starts = ring_slot(lengths, sink_size=sink_size, slots=slots)
        return append(cache, keys, values, starts=starts, num_tokens=num_tokens)
    # Per slot, the latest position that belongs there; slots it came to before keep their content.
    lengths, num_tokens = lengths[:, None], num_tokens[:, None]
    slot, recent_size = jnp.arange(slots, dtype=lengths.dtype)[None, :], slots - sink_size
    last = lengths + num_tokens - 1
    position = jnp.where(slot < sink_size, slot, last - (last - slot) % recent_size)
    fresh = (position >= jnp.maximum(lengths, jnp.minimum(slot, sink_size))) & (position <= last)
    source = jnp.clip(position - lengths, 0, keys.shape[1] - 1)

    def take_in(old, new):
        new = jnp.take_along_axis(new, source[:, None, :, None], axis=2)
        return jnp.where(fresh[:, None, :, None], new, old)

    return jax.tree.map(take_in, cache, _like(cache, keys, values))


def append_in_blocks(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
) -> KVCache:
    """Take in a chunk, packing the blocks of 64 tokens that it completes.

    Args:
      cache: packed blocks, and the ring of the latest tokens.
      keys: keys of the chunk, rotated.
      values: values of the chunk.
      lengths: tokens before the chunk.
      num_tokens: tokens of the chunk that count, per row.
    """
    begun = lengths % BLOCK  # tokens of an unfinished block; they are the ring's first ones
    complete = (begun + num_tokens) // BLOCK * BLOCK
    window = -(-(BLOCK - 1 + keys.shape[1]) // BLOCK) * BLOCK
    at, end = jnp.arange(window, dtype=begun.dtype)[None, :], begun[:, None]
    source = jnp.where(at < end, at, BLOCK + at - end)
    source = jnp.minimum(source, BLOCK + keys.shape[1] - 1)

    def pack_in(cached: Packed, ring: Array, new: Array) -> Packed:
        joined = jnp.concatenate([ring, new], axis=2)
        joined = jnp.take_along_axis(joined, source[:, None, :, None], axis=2)

        def write(old: Array, new: Array) -> Array:
            tokens = cached.shape[2] // old.shape[2]
            return _write(old, new, (lengths - begun) // tokens, complete // tokens)

        return jax.tree.map(write, cached, packed.pack(joined, cached.layout))

    ring, new = cache.latest, _like(cache.latest, keys, values)
    return KVCache(
        keys=pack_in(cache.keys, ring.keys, new.keys),
        values=pack_in(cache.values, ring.values, new.values),
        latest=append_to_ring(
            ring, keys, values, lengths=lengths, num_tokens=num_tokens, sink_size=0
        ),
    )


def ring_slot(positions: Int[Array, " batch"], *, sink_size: int, slots: int):
    """Return the slot of a position among the sinks and the ring."""
    in_ring = sink_size + (positions - sink_size) % (slots - sink_size)
    return jnp.where(positions < sink_size, positions, in_ring)


def past(
    cache: KVCache,
    keys: NewKV,
    values: NewKV,
    *,
    lengths: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    sink_size: int,
) -> Past:
    """Lay out what the streaming heads of a chunk need of the tokens before it.

    The sinks include those of the chunk itself; the recent tokens are put in order of position.
    Takes the cache as it was before the chunk.
    """
    new, cache = unpacked(_like(cache, keys, values), keys.dtype), unpacked(cache, keys.dtype)
    recent_size = cache.slots - sink_size
    # Position lengths - recent_size + i comes at index i; those below sink_size are masked there.
    order = (lengths[:, None] + jnp.arange(recent_size, dtype=lengths.dtype)[None, :]) - sink_size
    order = sink_size + order % recent_size

    def sinks(old, new):
        return _write(old[:, :, :sink_size], new, lengths, num_tokens)

    def recents(old):
        return jnp.take_along_axis(old, order[:, None, :, None], axis=2)

    return Past(
        sink_keys=sinks(cache.keys, new.keys),
        sink_values=sinks(cache.values, new.values),
        recent_keys=recents(cache.keys),
        recent_values=recents(cache.values),
        lengths=lengths,
    )


def as_cached(cache: KVCache, keys: NewKV, values: NewKV) -> tuple[NewKV, NewKV]:
    """Return keys and values as they will be read from the cache: rounded if it quantises."""
    if not isinstance(cache.keys, Packed):
        return keys, values
    new = unpacked(_like(cache, keys, values), keys.dtype)
    return jnp.swapaxes(new.keys, 1, 2), jnp.swapaxes(new.values, 1, 2)


def unpacked(cache: KVCache, dtype: DTypeLike) -> KVCache:
    """Return a cache with its numbers unpacked to `dtype`, as they are if it does not quantise."""
    if not isinstance(cache.keys, Packed):
        return cache
    return KVCache(keys=packed.unpack(cache.keys, dtype), values=packed.unpack(cache.values, dtype))


def _like(cache: KVCache, keys: NewKV, values: NewKV) -> KVCache:
    """Return a chunk in the cache's layout and format."""
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    if isinstance(cache.keys, Packed):
        keys = packed.pack(keys, cache.keys.layout)
        values = packed.pack(values, cache.values.layout)
    return KVCache(keys=keys, values=values)


def _write(
    buffer: Shaped[Array, "batch kv_heads slots ..."],
    new: Shaped[Array, "batch kv_heads length ..."],
    starts: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
) -> Shaped[Array, "batch kv_heads slots ..."]:
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
