"""Where the slots of a paged cache lie, and the rows of its rings.

Slot s of a row, which holds position s, is slot s % page_size of page table[row, s // page_size]
(`place`; kernels.pages reads by the same rule). The same page numbers hold in every layer, and in
every array of a packed cache.

Rings have a row per request, beside rows for snapshots of them: what streaming heads knew at some
place of a text, from where it can be read on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from duo_jax.cache.state import KVCache, LayerCache
from kernels.pages import Pages

Layers = tuple[LayerCache, ...]
Rings = tuple[tuple[KVCache | None, ...], ...]  # of each layer
Row = Int[Array, ""] | int


def place(
    slots: Int[Array, "batch length"], pages: Pages, page_size: int
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Return the pages that slots lie in, and their places in these."""
    return jnp.take_along_axis(pages, slots // page_size, axis=1, mode="clip"), slots % page_size


def write_to_pages(
    pool: Shaped[Array, "pages kv_heads page_size _"],
    new: Shaped[Array, "batch kv_heads length _"],
    starts: Int[Array, " batch"],
    num_tokens: Int[Array, " batch"],
    pages: Pages,
) -> Shaped[Array, "pages kv_heads page_size _"]:
    """Write each row's first tokens from its start on into its pages."""
    at = jnp.arange(new.shape[2], dtype=starts.dtype)[None, :]
    slots = starts[:, None] + at
    page, inside = place(slots, pages, pool.shape[2])
    written = (at < num_tokens[:, None]) & (slots < pages.shape[1] * pool.shape[2])
    page = jnp.where(written, page, pool.shape[0])  # no page: dropped
    return pool.at[page, :, inside].set(jnp.swapaxes(new, 1, 2), mode="drop")


def rings_of(layers: Layers) -> Rings:
    """Return what belongs to a row alone: streaming heads, and the latest tokens in "int2"."""
    return tuple((layer.streaming, *(part.latest for part in layer.full)) for layer in layers)


def with_rings(layers: Layers, rings: Rings) -> Layers:
    """Return the layers with these rings."""

    def one(layer: LayerCache, streaming: KVCache | None, latest: Any) -> LayerCache:
        full = zip(layer.full, latest, strict=True)
        parts = tuple(dataclasses.replace(part, latest=ring) for part, ring in full)
        return dataclasses.replace(layer, streaming=streaming, full=parts)

    pairs = zip(layers, rings, strict=True)
    return tuple(one(layer, streaming, latest) for layer, (streaming, *latest) in pairs)


def take_rows(layers: Layers, first: Row, size: int) -> Layers:
    """Return the layers with `size` rows of their rings."""

    def some(ring: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(ring, first, size, axis=0)

    return with_rings(layers, jax.tree.map(some, rings_of(layers)))


def put_rows(layers: Layers, some: Layers, first: Row) -> Layers:
    """Return `some`, which `take_rows` made, with all rows of the rings."""

    def put(ring: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(ring, new, first, axis=0)

    return with_rings(some, jax.tree.map(put, rings_of(layers), rings_of(some)))


def copy_row(layers: Layers, source: Row, target: Row) -> Layers:
    """Copy a row of the rings over another one."""
    return put_rows(layers, take_rows(layers, source, 1), target)


def copy_page(layers: Layers, source: Row, target: Row) -> Layers:
    """Copy a page over another one, in every pool."""

    def copy(pool: Array) -> Array:
        page = jax.lax.dynamic_slice_in_dim(pool, source, 1, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(pool, page, target, axis=0)

    return _map_pools(copy, layers)


def clear_row(layers: Layers, row: Row) -> Layers:
    """Write zeros into a row of the rings."""

    def clear(ring: Array) -> Array:
        zeros = jnp.zeros((1, *ring.shape[1:]), ring.dtype)
        return jax.lax.dynamic_update_slice_in_dim(ring, zeros, row, axis=0)

    return with_rings(layers, jax.tree.map(clear, rings_of(layers)))


def clear_page(layers: Layers, page: Row) -> Layers:
    """Write zeros into a page, in every pool."""

    def clear(pool: Array) -> Array:
        zeros = jnp.zeros((1, *pool.shape[1:]), pool.dtype)
        return jax.lax.dynamic_update_slice_in_dim(pool, zeros, page, axis=0)

    return _map_pools(clear, layers)


def _map_pools(change: Callable[[Array], Array], layers: Layers) -> Layers:
    """Return the layers with another version of every pool of pages."""

    def changed(part: KVCache) -> KVCache:
        return dataclasses.replace(
            part, keys=jax.tree.map(change, part.keys), values=jax.tree.map(change, part.values)
        )

    return tuple(
        dataclasses.replace(layer, full=tuple(map(changed, layer.full))) for layer in layers
    )


def adopt(layers: Layers, dense: Layers, numbers: Int[Array, " pages"], row: Row) -> Layers:
    """Copy a cache of one row, which is not paged, into pages and a row of the rings.

    Args:
      layers: of the paged cache.
      dense: of the other, in the same format.
      numbers: pages for its slots, from the first on, as many as its text fills.
      row: for its rings.
    """

    def put(pool: Array, leaf: Array) -> Array:
        size = pool.shape[2]
        slots = numbers.shape[0] * size
        leaf = leaf[0, :, :slots]
        leaf = jnp.pad(leaf, ((0, 0), (0, slots - leaf.shape[1]), (0, 0)))
        cut = leaf.reshape(leaf.shape[0], -1, size, leaf.shape[-1])
        return pool.at[numbers].set(jnp.swapaxes(cut, 0, 1))

    def put_part(part: KVCache, other: KVCache) -> KVCache:
        keys, values = jax.tree.map(put, (part.keys, part.values), (other.keys, other.values))
        return dataclasses.replace(part, keys=keys, values=values)

    def put_layer(layer: LayerCache, other: LayerCache) -> LayerCache:
        return dataclasses.replace(layer, full=tuple(map(put_part, layer.full, other.full)))

    alike = tuple(map(_divided_alike, dense, layers))
    filled = tuple(map(put_layer, layers, alike))
    return put_rows(layers, with_rings(filled, rings_of(alike)), row)


def _divided_alike(layer: LayerCache, like: LayerCache) -> LayerCache:
    """Return a layer whose full heads are divided among buffers as those of another."""
    if not like.full:
        return layer
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *layer.full)
    full, first = [], 0
    for part in like.full:
        some = slice(first, first + part.keys.shape[1])
        full.append(jax.tree.map(lambda leaf: leaf[:, some], joined))  # noqa: B023
        first = some.stop
    return dataclasses.replace(layer, full=tuple(full))
