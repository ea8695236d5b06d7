"""Caches in pages: the slots of a row lie in pages of a pool that all rows share, in any order.

    pool   keys or values, packed or not: [pages, kv_heads, page_size, head_dim]
    pages  [batch, most_pages]: numbers of the pages that a row's slots lie in

Slot s of row b is slot s % page_size of page pages[b, s // page_size]. Entries beyond a row's
filled slots may be the number of any page. page_size is a power of two of 64 or more, so that
blocks of packed keys and tiles of kernels lie in one page.

A kernel's tile gets its address from the table; PagedReader hands the tile's page to the reader of
the format. Nothing is copied or gathered.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.packed import BLOCK, Packed, read_slots, unpack
from kernels.packed import reader as packed_reader
from kernels.reader import Mask, Operands, Reader
from kernels.tile_io import Page, Scalar

Pages = Int[Array, "batch most_pages"]


def num_slots(k: Array | Packed, pages: Pages | None) -> int:
    """Return the slots of a row."""
    return k.shape[2] if pages is None else pages.shape[1] * k.shape[2]


def check(k: Array | Packed, pages: Pages, batch: int) -> None:
    """Refuse pages that do not fit the pool or the queries.

    Raises:
      ValueError: another shape or dtype, or pages of another size.
    """
    if pages.ndim != 2 or pages.shape[0] != batch or not jnp.issubdtype(pages.dtype, jnp.integer):
        raise ValueError(f"pages are {pages.dtype} {pages.shape}, not integers for {batch} rows")
    size = k.shape[2]
    if size < BLOCK or size & (size - 1):
        raise ValueError(f"a page has {size} slots, not a power of two of {BLOCK} or more")


def block_slots(k: Array | Packed, pages: Pages | None, most: int) -> int:
    """Return how many slots, at most `most`, `read_block` reads at a time: whole pages, if any."""
    if pages is None:
        return min(most, k.shape[2])
    return k.shape[2] * min(max(most // k.shape[2], 1), pages.shape[1])


def read_block(
    x: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    pages: Pages | None,
    first: Int[Array, ""],
    size: int,
    dtype: DTypeLike,
    *,
    head: Int[Array, ""] | None = None,
) -> Float[Array, "batch heads size head_dim"]:
    """Return consecutive slots of every row, unpacked; of a paged cache, whole pages.

    Args:
      x: keys or values, or a pool of them.
      pages: the table of a paged cache.
      first: of the slots.
      size: their number.
      dtype: of the result.
      head: the one KV head that is read; None: all.
    """
    if pages is None:
        if head is not None:
            x = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, head, 1, axis=1), x)
        return read_slots(x, first, size, dtype)
    page_size = x.shape[2]
    some = jax.lax.dynamic_slice_in_dim(pages, first // page_size, size // page_size, axis=1)

    def joined(leaf: Array) -> Array:
        # One head of these pages: cut out of the pool first, XLA would copy it from all pages.
        read = leaf[some] if head is None else leaf[some, head][:, :, None]
        found = jnp.swapaxes(read, 1, 2)  # [batch, heads, pages, a page's slots, _]
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    found = jax.tree.map(joined, x)
    return unpack(found, dtype) if isinstance(found, Packed) else found


def operands(
    k: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    v: Float[Array, "rows kv_heads slots head_dim"] | Packed,
    pages: Pages | None,
    index_map: Callable[..., tuple[Any, Any]],
    *,
    name: str,
) -> Operands:
    """Describe a cache, paged or not.

    Args:
      k: keys, or a pool of them.
      v: values, or a pool of them.
      pages: the table of a paged cache.
      index_map: returns row and KV head of a program, given its place in the grid.
      name: of the kernel.
    """
    pool = packed_reader.operands(k, v, index_map, name=name)
    if pages is None:
        return pool

    def of_head(*at):
        return 0, index_map(*at)[1], 0, 0

    specs = [pl.BlockSpec((x.shape[0], None, *x.shape[2:]), of_head) for x in pool.arrays]
    table = pl.BlockSpec((None, pages.shape[1]), lambda *at: (index_map(*at)[0], 0))

    def reader(refs: Sequence[jax.Ref], *, block_kv: int, softmax_scale: float) -> Reader:
        def of_page(page: Scalar) -> Reader:
            inside = [Page(ref, page) for ref in refs[1:]]
            return pool.reader(inside, block_kv=block_kv, softmax_scale=softmax_scale)

        return PagedReader(table=refs[0], of_page=of_page, block_kv=block_kv)

    return Operands(
        arrays=(pages.astype(jnp.int32), *pool.arrays),
        specs=(table, *specs),
        reader=reader,
        name=f"{pool.name}_paged",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedReader:
    """Keys and values in pages; see kernels.reader.Reader."""

    table: jax.Ref  # [most_pages]
    of_page: Callable[[Scalar], Reader]
    block_kv: int

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.of_page(0).slots

    @property
    def slots(self) -> int:
        return self.table.shape[0] * self.page_size

    def load_queries(self, ref: jax.Ref, rows: Int[Array, " rows"], *, end: Scalar) -> Any:
        return self.of_page(0).load_queries(ref, rows, end=end)

    def start(self, queries: Any) -> Any:
        return self.of_page(0).start(queries)

    def add_block(
        self, index: Scalar, state: Any, queries: Any, mask: Mask | None, *, end: Scalar
    ) -> Any:
        """Look the block's page up, and let its reader add the block."""
        per_page = self.page_size // self.block_kv
        place = jax.lax.div(index, per_page)
        before = place * self.page_size  # slots of earlier pages
        page = self.of_page(self.table[place])
        inside = None if mask is None else lambda positions: mask(before + positions)
        within = index - place * per_page
        return page.add_block(within, state, queries, inside, end=end - before)

    def store(
        self,
        state: Any,
        out_ref: jax.Ref,
        lse_ref: jax.Ref,
        rows: Int[Array, " rows"],
        *,
        end: Scalar,
    ) -> None:
        self.of_page(0).store(state, out_ref, lse_ref, rows, end=end)
