"""The two KV caches of a model whose heads are split: full ones, and sinks with a ring.

Both are laid out [batch, kv_heads, slots, head_dim], the order in which decoding reads them: the
tokens of one head lie together. A retrieval head's position p is in slot p. A streaming head has
sink + recent slots: position p < sink in slot p, a later one in slot
sink + (p - sink) % recent, until the ring overwrites it. So the filled slots are always the first
min(length, slots), and attention does not care about their order, since keys carry their rotation.

Rows of a batch have lengths of their own. Slots beyond a row's length hold anything finite (zeros,
or what was there before): attention gives them weight 0, and 0 * nan is nan.

What a number takes is chosen per run (`KVFormat`): "model" is the dtype of the parameters, "bf16"
bfloat16; "int8" and "int4" quantise every token of every head by itself, after RoPE; "int2"
quantises the full caches in blocks of 64 tokens (kernels.packed; KIVI, arXiv 2402.02750) and keeps
the latest 64 tokens as they are, in a ring of their own, since a block cannot be written token by
token. A token is seen exactly while it is among the latest 64, then as its codes, so that nothing
depends on how a text is cut into chunks. Streaming heads of "int2" stay in the dtype of the
parameters: sinks and recents are what KIVI keeps, and they are few.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from kernels import address_limit, packed, pytree
from kernels.packed import Layout, Packed

KVFormat = Literal["model", "bf16", "int8", "int4", "int2"]

_LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "int8": (packed.INT8, packed.INT8),
    "int4": (packed.INT4, packed.INT4),
    "int2": (packed.INT2_KEYS, packed.INT2_VALUES),
}


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (already rotated) and values of some KV heads of one layer."""

    keys: Float[Array, "batch kv_heads slots head_dim"] | Packed
    values: Float[Array, "batch kv_heads slots head_dim"] | Packed
    # "int2" only: a ring of the latest tokens, position p in slot p % 64.
    latest: "KVCache | None" = None
    format: KVFormat = dataclasses.field(default="model", metadata={"static": True})

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[2]


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


def check_kv_format(config: DuoConfig, kv: str) -> None:
    """Refuse a format of caches that does not exist or that the model cannot have.

    Raises:
      InputError: it cannot.
    """
    if kv not in get_args(KVFormat):
        raise InputError(f"KV format {kv!r} is not one of {', '.join(get_args(KVFormat))}")
    head_dim = config.architecture.head_dim
    for layout in _LAYOUTS.get(kv, ()):
        if head_dim % layout.fields:
            raise InputError(
                f"head_dim {head_dim} is not a multiple of {layout.fields}, as KV {kv} needs"
            )


def init_cache(
    config: DuoConfig,
    *,
    batch_size: int,
    max_len: int,
    dtype: DTypeLike = jnp.float32,
    kv: str = "model",
) -> Cache:
    """Return an empty cache.

    Args:
      config: the split model.
      batch_size: rows.
      max_len: tokens that a row can hold.
      dtype: of the parameters.
      kv: a KVFormat.

    Raises:
      InputError: there is no such format, or the model's head_dim does not go with it.
    """
    check_kv_format(config, kv)
    architecture, slots = config.architecture, _whole_blocks(max_len, kv)
    shape = (batch_size, 1, slots, architecture.head_dim)
    ring_shape = (config.ring_slots, architecture.head_dim)
    most = _heads_per_buffer(jax.eval_shape(lambda: _full_cache(shape, dtype, kv)))

    def layer(retrieval: int) -> LayerCache:
        streaming = architecture.num_kv_heads - retrieval
        ring, ring_kv = (batch_size, streaming, *ring_shape), "model" if kv == "int2" else kv
        return LayerCache(
            full=tuple(
                _full_cache((batch_size, min(most, retrieval - first), *shape[2:]), dtype, kv)
                for first in range(0, retrieval, most)
            ),
            streaming=_kv_cache(ring, dtype, ring_kv) if streaming else None,
        )

    return Cache(
        layers=tuple(map(layer, config.retrieval_counts)), lengths=jnp.zeros(batch_size, jnp.int32)
    )


def cache_shapes(config: DuoConfig, **sizes: Any) -> Cache:
    """Return what `init_cache` makes of the same arguments as shapes: no memory is taken."""
    return jax.eval_shape(functools.partial(init_cache, config, **sizes))


def cache_bytes(
    config: DuoConfig, *, batch_size: int, max_len: int, dtype: DTypeLike, kv: str = "model"
) -> int:
    """Return the bytes of the keys and values that `init_cache` allocates."""
    shapes = cache_shapes(config, batch_size=batch_size, max_len=max_len, dtype=dtype, kv=kv)
    leaves = jax.tree.leaves(shapes.layers)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def live_bytes(cache: Cache) -> int:
    """Return the bytes that the buffers of keys and values take on their device."""
    return sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(cache.layers))


def grow(cache: Cache, *, max_len: int) -> Cache:
    """Return the cache with room for `max_len` tokens; copies the full caches one by one."""

    def larger(part: KVCache) -> list[KVCache]:
        slots = _whole_blocks(max_len, part.format)

        def pad(leaf: Array) -> Array:
            more = slots * leaf.shape[2] // part.slots - leaf.shape[2]
            return jnp.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0)))

        def some_heads(first: int) -> KVCache:
            some = jax.tree.map(lambda leaf: leaf[:, first : first + most], part)
            keys, values = (jax.tree.map(pad, x) for x in (some.keys, some.values))
            return dataclasses.replace(some, keys=keys, values=values)

        one_head = jax.tree.map(lambda leaf: leaf[:, :1], (part.keys, part.values))
        most = _heads_per_buffer(jax.eval_shape(lambda: jax.tree.map(pad, one_head)))
        return [some_heads(first) for first in range(0, part.keys.shape[1], most)]

    layers = (
        dataclasses.replace(layer, full=tuple(new for part in layer.full for new in larger(part)))
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=tuple(layers))


def _kv_cache(shape: tuple[int, int, int, int], dtype: DTypeLike, kv: str) -> KVCache:
    if kv not in _LAYOUTS:
        dtype = jnp.bfloat16 if kv == "bf16" else dtype
        return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype), format=kv)
    keys, values = (packed.zeros(shape, layout) for layout in _LAYOUTS[kv])
    return KVCache(keys=keys, values=values, format=kv)


def _full_cache(shape: tuple[int, int, int, int], dtype: DTypeLike, kv: str) -> KVCache:
    cache = _kv_cache(shape, dtype, kv)
    if kv != "int2":
        return cache
    batch, heads, _, head_dim = shape
    latest = _kv_cache((batch, heads, packed.BLOCK, head_dim), dtype, "model")
    return dataclasses.replace(cache, latest=latest)


def _whole_blocks(max_len: int, kv: str) -> int:
    """Round the slots of a full cache up to what is packed together."""
    block = packed.BLOCK if kv == "int2" else 1
    return -(-max_len // block) * block


def _heads_per_buffer(one_head: Any) -> int:
    """Return how many full heads a buffer may hold so that kernels can address all of it."""
    largest = max(leaf.size for leaf in jax.tree.leaves(one_head))
    return max(1, address_limit.MAX_ELEMENTS // largest)
