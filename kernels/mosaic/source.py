"""Where the tiles of a range lie: in rows of a cache, in pages of a pool, or in whole sequences."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels.tile_io import Scalar

# The ref of a tile in what is stored of keys or values, by its index and its slots there.
Tile = Callable[[jax.Ref, Scalar, int], Any]


def in_cache(row: Array, kv_head: Array) -> Tile:
    """Return tiles of refs [batch, kv_heads, slots, ...]."""
    return lambda ref, index, slots: ref.at[row, kv_head, pl.ds(index * slots, slots)]


def in_sequence(row: Array, kv_head: Array) -> Tile:
    """Return tiles of refs [batch, length, kv_heads, head_dim]."""
    return lambda ref, index, slots: ref.at[row, pl.ds(index * slots, slots), kv_head]


def in_pages(table: jax.Ref, row: Array, kv_head: Array) -> Tile:
    """Return tiles of refs [pages, kv_heads, page_size, ...]; see kernels.pages.

    Whoever loads a tile looks its page up in the table [batch, most_pages].
    """

    def tile(ref: jax.Ref, index: Scalar, slots: int) -> Any:
        per_page = ref.shape[2] // slots
        place = lax.div(index, per_page)
        first = (index - place * per_page) * slots
        return ref.at[table[row, place], kv_head, pl.ds(first, slots)]

    return tile
