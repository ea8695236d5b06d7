"""The two KV caches of a split model: full caches, and sinks with a ring.

Both are laid out [batch, kv_heads, slots, head_dim], the order in which decoding reads them: the
tokens of one head lie together. A retrieval head keeps position p in slot p. A streaming head has
sink + recent slots (duo_jax.cache.ring). In both, the filled slots are the first
min(length, slots); their order does not matter to attention, since keys carry their rotation.

Each row of a batch has its own length. Slots beyond it hold anything finite, such as zeros or
older tokens: attention gives them weight 0, but 0 * nan is nan.

A cache of many requests is paged: its full caches are pools of pages that all rows share, and a
table says which pages a row's slots lie in (kernels.pages). The rings of streaming heads are small,
and every row has its own (duo_jax.cache.pages).

Where tokens are evicted from retrieval heads (duo_jax.cache.evict), a full cache holds fewer tokens
than were read: the first `kept` slots, in order of position, another choice in every head.

The storage format of keys and values is chosen per run (`KVFormat`):

    "model"         the dtype of the parameters
    "bf16"          bfloat16
    "int8", "int4"  every token of every head is quantised by itself, after RoPE
    "int2"          full caches are quantised in blocks of 64 tokens (kernels.packed; KIVI, arXiv
                    2402.02750). A block cannot be written token by token, so the latest 64 tokens
                    are kept as they are in a ring of their own. A token is seen exactly while it
                    is among the latest 64, then as its codes, however the text is cut into chunks.
                    Streaming heads stay in "model": sinks and recent tokens are what KIVI keeps
                    too, and they are few.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from duo_jax.cache import stripes
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import AnyMesh, num_groups, num_parts
from duo_jax.schema.check import argument
from kernels import address_limit, packed, pytree
from kernels.packed import Layout, Packed
from kernels.pages import Pages

KVFormat = Literal["model", "bf16", "int8", "int4", "int2"]
Shape = tuple[int, int, int, int]  # [batch, kv_heads, slots, head_dim]

_GROWING = ("keys", "values", "votes")  # of a full cache, with its slots

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
    # Where tokens are to be evicted: how much each was looked at (duo_jax.serve.votes).
    votes: Float[Array, "batch kv_heads slots 1"] | None = None
    format: KVFormat = dataclasses.field(default="model", metadata={"static": True})

    @property
    def rows(self) -> int:
        """Texts that there is room for."""
        return self.keys.shape[0]

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[2]

    def first_rows(self, number: int) -> "KVCache":
        """Return the cache of the first rows."""
        return jax.tree.map(lambda x: x[:number], self)


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The caches of one layer; empty and None where it has no such head.

    Retrieval heads share as few buffers as kernels can address, in order: usually one.
    """

    full: tuple[KVCache, ...]
    streaming: KVCache | None


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all tokens that were read, in every layer."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]  # tokens read so far, per row
    kept: Int[Array, " batch"]  # how many of them full caches hold
    pages: Pages | None = None  # of paged full caches
    # The devices that full caches are cut over (duo_jax.cache.stripes).
    mesh: AnyMesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value buffers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))


def check_kv_format(config: DuoConfig, name: str) -> KVFormat:
    """Return the format of this name.

    Raises:
      InputError: there is none, or the model's head_dim does not go with it.
    """
    kv_format = argument("KV format", name, KVFormat)
    head_dim = config.architecture.head_dim
    for layout in _LAYOUTS.get(kv_format, ()):
        if head_dim % layout.fields:
            raise InputError(
                f"KV format {name} needs a head_dim that is a multiple of {layout.fields}, not "
                f"{head_dim}"
            )
    return kv_format


def init_cache(
    config: DuoConfig,
    *,
    batch_size: int,
    max_len: int,
    dtype: DTypeLike = jnp.float32,
    kv: str = "model",
    votes: bool = False,
    num_pages: int | None = None,
    page_size: int = 64,
    mesh: AnyMesh | None = None,
) -> Cache:
    """Return an empty cache.

    Args:
      config: the split model.
      batch_size: number of rows.
      max_len: tokens that a row can hold.
      dtype: data type of the parameters.
      kv: storage format, a KVFormat.
      votes: whether full caches count how much their tokens are looked at; not with "int2".
      num_pages: makes full caches pools of so many pages. Default: no pages; every row has
        `max_len` slots of its own.
      page_size: slots of a page.
      mesh: devices that share the cache.

    Raises:
      InputError: as `check_kv_format`; groups of devices cannot share the rows evenly.
    """
    sizes = {"batch_size": batch_size, "max_len": max_len, "dtype": dtype}
    sizes |= {"num_pages": num_pages, "page_size": page_size}
    make = functools.partial(empty, config, **sizes, kv=kv, votes=votes, mesh=mesh)
    if mesh is None:
        return make()
    if batch_size % num_groups(mesh):
        raise InputError(
            f"{batch_size} rows cannot be shared by {num_groups(mesh)} groups of devices evenly"
        )
    return jax.jit(make, out_shardings=stripes.shardings(mesh, jax.eval_shape(make)))()


def empty(
    config: DuoConfig,
    *,
    batch_size: int,
    max_len: int,
    dtype: DTypeLike = jnp.float32,
    kv: str = "model",
    votes: bool = False,
    num_pages: int | None = None,
    page_size: int = 64,
    mesh: AnyMesh | None = None,
) -> Cache:
    """Return what `init_cache` does, all of it on one device."""
    kv_format = check_kv_format(config, kv)
    assert not (votes and kv_format == "int2")
    architecture, slots = config.architecture, _whole_blocks(max_len, kv_format, num_parts(mesh))
    rows, pages = batch_size, None
    if num_pages is not None:
        assert page_size == stripes.whole(page_size, num_parts(mesh))
        rows, slots = num_pages, page_size
        pages = jnp.zeros((batch_size, -(-max_len // page_size)), jnp.int32)
    shape = (rows, 1, slots, architecture.head_dim)
    ring_shape = (config.ring_slots, architecture.head_dim)
    most = _heads_per_buffer(
        jax.eval_shape(lambda: _full_cache(shape, dtype, kv_format)), num_parts(mesh)
    )

    def layer(retrieval: int) -> LayerCache:
        streaming = architecture.num_kv_heads - retrieval
        ring = (batch_size, streaming, *ring_shape)
        ring_format: KVFormat = "model" if kv_format == "int2" else kv_format
        return LayerCache(
            full=tuple(
                _full_cache(
                    (rows, min(most, retrieval - first), *shape[2:]),
                    dtype,
                    kv_format,
                    votes,
                    batch_size,
                )
                for first in range(0, retrieval, most)
            ),
            streaming=_kv_cache(ring, dtype, ring_format) if streaming else None,
        )

    none = jnp.zeros(batch_size, jnp.int32)
    layers = tuple(map(layer, config.retrieval_counts))
    cache = Cache(layers=layers, lengths=none, kept=none, pages=pages, mesh=mesh)
    return with_lengths(cache, none)


def with_lengths(cache: Cache, lengths: Int[Array, " batch"]) -> Cache:
    """Return the cache as one that holds so many tokens of every row, none of them evicted."""
    # Two buffers: a cache that is donated must not hold one twice.
    return dataclasses.replace(cache, lengths=lengths, kept=jnp.copy(lengths))


def grow(cache: Cache, *, max_len: int) -> Cache:
    """Return the cache with room for `max_len` tokens per row; copies full caches one by one."""

    def larger(part: KVCache) -> list[KVCache]:
        slots = _whole_blocks(max_len, part.format, num_parts(cache.mesh))

        def pad(leaf: Array) -> Array:
            more = slots * leaf.shape[2] // part.slots - leaf.shape[2]
            return stripes.pad(leaf, more, cache.mesh)

        def some_heads(first: int) -> KVCache:
            some = jax.tree.map(lambda leaf: leaf[:, first : first + most], part)
            padded = jax.tree.map(pad, (some.keys, some.values, some.votes))
            return dataclasses.replace(some, **dict(zip(_GROWING, padded, strict=True)))

        one_head = jax.tree.map(lambda leaf: leaf[:, :1], (part.keys, part.values))
        most = _heads_per_buffer(
            jax.eval_shape(lambda: jax.tree.map(pad, one_head)), num_parts(cache.mesh)
        )
        return [some_heads(first) for first in range(0, part.keys.shape[1], most)]

    layers = (
        dataclasses.replace(layer, full=tuple(new for part in layer.full for new in larger(part)))
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=tuple(layers))


def _kv_cache(shape: Shape, dtype: DTypeLike, kv_format: KVFormat) -> KVCache:
    if kv_format in _LAYOUTS:
        keys, values = (packed.zeros(shape, layout) for layout in _LAYOUTS[kv_format])
    else:
        dtype = jnp.bfloat16 if kv_format == "bf16" else dtype
        keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return KVCache(keys=keys, values=values, format=kv_format)


def _full_cache(
    shape: Shape,
    dtype: DTypeLike,
    kv_format: KVFormat,
    votes: bool = False,
    batch_size: int = 1,
) -> KVCache:
    """Return a full cache; `batch_size`: rows of its ring, where the cache itself has pages."""
    cache = _kv_cache(shape, dtype, kv_format)
    if votes:
        cache = dataclasses.replace(cache, votes=jnp.zeros((*shape[:3], 1), jnp.float32))
    if kv_format != "int2":
        return cache
    _, heads, _, head_dim = shape
    latest = _kv_cache((batch_size, heads, packed.BLOCK, head_dim), dtype, "model")
    return dataclasses.replace(cache, latest=latest)


def _whole_blocks(max_len: int, kv_format: KVFormat, num_devices: int) -> int:
    """Round the slots of a full cache up to whole blocks, and to whole stripes of all devices."""
    block = packed.BLOCK if kv_format == "int2" else 1
    return stripes.whole(-(-max_len // block) * block, num_devices)


def _heads_per_buffer(one_head: Any, num_devices: int) -> int:
    """Return how many full heads a buffer may hold so that kernels can address a device's part."""
    largest = max(leaf.size for leaf in jax.tree.leaves(one_head)) // num_devices
    return max(1, address_limit.MAX_ELEMENTS // largest)
