"""Where the tiles of a range lie: in rows of a cache, in pages of a pool, or in whole sequences."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels.tile_io import Scalar

Tile = Callable[[jax.Ref, Scalar], Any]  # the ref of a tile [block_kv, head_dim], by its index


def in_cache(row: Array, kv_head: Array, block_kv: int) -> Tile:
    """Return tiles of refs [batch, kv_heads, slots, head_dim]."""
    return lambda ref, index: ref.at[row, kv_head, pl.ds(index * block_kv, block_kv)]


def in_sequence(row: Array, kv_head: Array, block_kv: int) -> Tile:
    """Return tiles of refs [batch, length, kv_heads, head_dim]."""
    return lambda ref, index: ref.at[row, pl.ds(index * block_kv, block_kv), kv_head]


def in_pages(table: jax.Ref, row: Array, kv_head: Array, block_kv: int) -> Tile:
    """Return tiles of refs [pages, kv_heads, page_size, head_dim]; see kernels.pages.

    Whoever loads a tile looks its page up in the table [batch, most_pages].
    """

    def tile(ref: jax.Ref, index: Scalar) -> Any:
        per_page = ref.shape[2] // block_kv
        place = lax.div(index, per_page)
        first = (index - place * per_page) * block_kv
        return ref.at[table[row, place], kv_head, pl.ds(first, block_kv)]

    return tile
