"""Tiles inside a Triton kernel: their sizes, and reading and writing them.

Sizes are powers of two. Where head_dim is not (80, 96), tiles are wider than the arrays, and the
columns beyond are masked: read as zeros, never written.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import compat

MIN_ROWS = 16  # of a matrix instruction

Scalar = Int[Array, ""] | int
Number = TypeVar("Number", int, Array)


class Page:
    """A page of a ref [pages, ...], as if it were a ref [...]; see kernels.pages.

    Pallas' Triton lowering takes one index per access, so the page's number joins each of them.
    """

    def __init__(self, ref: jax.Ref, page: Scalar) -> None:
        self._ref, self._page = ref, page
        self.shape, self.dtype = ref.shape[1:], ref.dtype

    @property
    def at(self) -> "Page":
        """What is indexed to name a part."""
        return self

    def __getitem__(self, index: Any) -> Any:
        return self._ref.at[(self._page, *index)]


Ref = jax.Ref | Page  # what tiles are read from


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def width(head_dim: int) -> int:
    """Return the columns of a tile of vectors."""
    return max(MIN_ROWS, power_of_two(head_dim))


def cdiv(a: Number, b: int) -> Number:
    """Divide a number of 0 or more, rounding up."""
    return (a + (b - 1)) // b


def indices(size: int, first: Scalar = 0) -> Int[Array, " {size}"]:
    """Return `size` consecutive 32-bit numbers."""
    return first + jnp.arange(size, dtype=jnp.int32)


def load(
    ref: Ref,
    rows: Int[Array, " rows"],
    *,
    end: Scalar,
    head: Scalar | None = None,
    columns: tuple[int, int] | None = None,
) -> Array:
    """Read vectors of a ref [length, head_dim], or of one head of [length, heads, head_dim].

    Args:
      ref: where to read.
      rows: which vectors.
      end: rows from here on are read as zeros.
      head: which head, if the ref has several.
      columns: the first column and the number of columns. Default: all.
    """
    at, mask = _place(ref, rows, end, head, columns)
    return compat.load(at, mask=mask, other=0)


def store(
    ref: jax.Ref,
    rows: Int[Array, " rows"],
    value: Float[Array, "rows width"],
    *,
    end: Scalar,
    columns: tuple[int, int] | None = None,
) -> None:
    """Write vectors to the rows of a ref [length, head_dim] before `end`; columns as in `load`."""
    at, mask = _place(ref, rows, end, None, columns)
    compat.store(at, value.astype(ref.dtype), mask=mask)


def load_vector(
    ref: jax.Ref, rows: Int[Array, " rows"], *, end: Scalar, head: Scalar | None = None
) -> Float[Array, " rows"]:
    """Read one number per row of a ref [length], or of one head of [heads, length].

    Rows from `end` on are read as zeros.
    """
    at = ref.at[rows] if head is None else ref.at[head, rows]
    return compat.load(at, mask=rows < end, other=0)


def store_vector(
    ref: jax.Ref, rows: Int[Array, " rows"], value: Float[Array, " rows"], *, end: Scalar
) -> None:
    """Write one number per row to a ref [length], for rows before `end`."""
    compat.store(ref.at[rows], value.astype(ref.dtype), mask=rows < end)


def _place(
    ref: Ref,
    rows: Int[Array, " rows"],
    end: Scalar,
    head: Scalar | None,
    columns: tuple[int, int] | None,
) -> tuple[Any, Bool[Array, "rows width"]]:
    """Return the view of a tile, and the mask of what lies inside the array."""
    first, count = columns or (0, ref.shape[-1])
    tile_width = width(count)
    mask = jnp.broadcast_to((rows < end)[:, None], (rows.shape[0], tile_width))
    read = indices(tile_width, first)
    if count != tile_width:
        mask = mask & (read < first + count)[None, :]
    where = (rows[:, None], read[None, :])
    return ref.at[where if head is None else (where[0], head, where[1])], mask
