"""The two KV caches of a model whose heads are split: full ones, and sinks with a ring.

Both are laid out [batch, kv_heads, slots, head_dim], the order in which decoding reads them: the
tokens of one head lie together. A retrieval head's position p is in slot p. A streaming head has
sink + recent slots: position p < sink in slot p, a later one in slot
sink + (p - sink) % recent, until the ring overwrites it. So the filled slots are always the first
min(length, slots), and attention does not care about their order, since keys carry their rotation.

Rows of a batch have lengths of their own. Slots beyond a row's length hold anything finite (zeros,
or what was there before): attention gives them weight 0, and 0 * nan is nan.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from duo_jax.split import DuoConfig
from kernels import Past, limits, pytree


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of some KV heads of one layer."""

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The caches of one layer; empty and None where it has no such head.

    The retrieval heads, in order, lie in as few buffers as kernels can address: usually one.
    """

    full: tuple[KVCache, ...]
    streaming: KVCache | None


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Everything a model remembers of the tokens it has read."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]  # tokens read so far, per row

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value buffers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))


def init_cache(
    config: DuoConfig, *, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Return an empty cache.

    Args:
      config: the split model.
      batch_size: rows.
      max_len: tokens that a row can hold.
      dtype: of keys and values; the dtype of the parameters.
    """
    head_dim, num_kv_heads = config.model.head_dim, config.model.num_kv_heads
    most = _heads_per_buffer(batch_size, max_len, head_dim)

    def kv_cache(heads: int, slots: int) -> KVCache:
        shape = (batch_size, heads, slots, head_dim)
        return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def layer(retrieval: int) -> LayerCache:
        streaming = num_kv_heads - retrieval
        return LayerCache(
            full=tuple(
                kv_cache(min(most, retrieval - first), max_len)
                for first in range(0, retrieval, most)
            ),
            streaming=kv_cache(streaming, config.ring_slots) if streaming else None,
        )

    return Cache(
        layers=tuple(map(layer, config.retrieval_heads)), lengths=jnp.zeros(batch_size, jnp.int32)
    )


def cache_bytes(config: DuoConfig, *, batch_size: int, max_len: int, dtype: DTypeLike) -> int:
    """Return the bytes of the keys and values that `init_cache` allocates."""
    retrieval = config.num_retrieval_heads
    streaming = config.model.num_layers * config.model.num_kv_heads - retrieval
    slots = retrieval * max_len + streaming * config.ring_slots
    return 2 * batch_size * slots * config.model.head_dim * jnp.dtype(dtype).itemsize


def grow(cache: Cache, *, max_len: int) -> Cache:
    """Return the cache with room for `max_len` tokens; copies the full caches one by one."""

    def larger(part: KVCache) -> list[KVCache]:
        batch, heads, slots, head_dim = part.keys.shape
        most = _heads_per_buffer(batch, max_len, head_dim)
        more = ((0, 0), (0, 0), (0, max_len - slots), (0, 0))
        return [
            jax.tree.map(lambda buffer, at=first: jnp.pad(buffer[:, at : at + most], more), part)
            for first in range(0, heads, most)
        ]

    layers = (
        dataclasses.replace(layer, full=tuple(new for part in layer.full for new in larger(part)))
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=tuple(layers))


def append(
    cache: KVCache,
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
    *,
    starts: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
) -> KVCache:
    """Write row b's first `num_tokens[b]` keys and values into slots starts[b], starts[b] + 1, ...

    Slots past the end are dropped. Only a window of `length` slots is read and written, so a
    donated cache is updated in place.
    """
    return KVCache(
        keys=_write(cache.keys, keys, starts, num_tokens),
        values=_write(cache.values, values, starts, num_tokens),
    )


def append_to_ring(
    cache: KVCache,
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
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
    slots = cache.keys.shape[2]
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
        new = jnp.take_along_axis(jnp.swapaxes(new, 1, 2), source[:, None, :, None], axis=2)
        return jnp.where(fresh[:, None, :, None], new, old)

    return KVCache(keys=take_in(cache.keys, keys), values=take_in(cache.values, values))


def ring_slot(positions: Int[Array, " batch"], *, sink_size: int, slots: int):
    """Return the slot of a position among the sinks and the ring."""
    in_ring = sink_size + (positions - sink_size) % (slots - sink_size)
    return jnp.where(positions < sink_size, positions, in_ring)


def past(
    cache: KVCache,
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    sink_size: int,
) -> Past:
    """Lay out what the streaming heads of a chunk need of the tokens before it.

    The sinks include those of the chunk itself; the recent tokens are put in order of position.
    Takes the cache as it was before the chunk.
    """
    recent_size = cache.keys.shape[2] - sink_size
    # Position lengths - recent_size + i comes at index i; those below sink_size are masked there.
    order = (lengths[:, None] + jnp.arange(recent_size, dtype=lengths.dtype)[None, :]) - sink_size
    order = sink_size + order % recent_size

    def sinks(old, new):
        return _write(old[:, :, :sink_size], new, lengths, num_tokens)

    def recents(old):
        return jnp.take_along_axis(old, order[:, None, :, None], axis=2)

    return Past(
        sink_keys=sinks(cache.keys, keys),
        sink_values=sinks(cache.values, values),
        recent_keys=recents(cache.keys),
        recent_values=recents(cache.values),
        lengths=lengths,
    )


def _heads_per_buffer(batch_size: int, max_len: int, head_dim: int) -> int:
    """Return how many full heads a buffer may hold so that kernels can address all of it."""
    return max(1, limits.MAX_ELEMENTS // (batch_size * max_len * head_dim))


def _write(
    buffer: Float[Array, "batch kv_heads slots head_dim"],
    new: Float[Array, "batch length kv_heads head_dim"],
    starts: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads slots head_dim"]:
    slots, length = buffer.shape[2], new.shape[1]
    window = min(length, slots)

    def write_row(buffer, new, start, num_tokens):
        at = jnp.clip(start, 0, slots - window)
        source = jnp.arange(window, dtype=at.dtype) - (start - at)
        fresh = (source >= 0) & (source < num_tokens)
        new = jnp.take(jnp.swapaxes(new, 0, 1), jnp.clip(source, 0, length - 1), axis=1)
        old = jax.lax.dynamic_slice_in_dim(buffer, at, window, axis=1)
        new = jnp.where(fresh[None, :, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, at, axis=1)

    return jax.vmap(write_row)(buffer, new, starts, num_tokens)
