"""What the Triton kernels share: sizes of tiles, and reading and writing them.

Tile sizes are powers of two. Where head_dim is not (80, 96), tiles are wider than the arrays, and
the columns beyond are masked: read as zeros, never written.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import compat

MIN_ROWS = 16  # of a matrix instruction


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How a kernel with tiles of queries and of keys cuts its work."""

    block_q: int  # queries of one head per tile; a power of two
    block_kv: int  # tokens per tile of keys; a power of two
    num_warps: int
    num_stages: int  # tiles on their way from memory at once


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def width(head_dim: int) -> int:
    """Return the columns of a tile of vectors."""
    return max(MIN_ROWS, power_of_two(head_dim))


def indices(size: int, first=0) -> Int[Array, " size"]:
    """Return `size` consecutive 32-bit numbers."""
    return first + jnp.arange(size, dtype=jnp.int32)


def load(
    ref, rows: Int[Array, " rows"], *, end, head=None, columns: tuple[int, int] | None = None
) -> Array:
    """Read vectors of a ref [length, head_dim], or of one head of [length, heads, head_dim].

    Rows from `end` on come as zeros. `columns` are the first one and how many; default: all.
    """
    at, mask = _place(ref, rows, end, head, columns)
    return compat.load(at, mask=mask, other=0)


def store(
    ref, rows: Int[Array, " rows"], value, *, end, columns: tuple[int, int] | None = None
) -> None:
    """Write vectors to the rows of a ref [length, head_dim] before `end`; columns as in `load`."""
    at, mask = _place(ref, rows, end, None, columns)
    compat.store(at, value.astype(ref.dtype), mask=mask)


def load_vector(ref, rows: Int[Array, " rows"], *, end, head=None) -> Array:
    """Read one number per row of a ref [length], or of one head of [heads, length].

    Rows from `end` on come as zeros.
    """
    at = ref.at[rows] if head is None else ref.at[head, rows]
    return compat.load(at, mask=rows < end, other=0)


def store_vector(ref, rows: Int[Array, " rows"], value, *, end) -> None:
    """Write one number per row to a ref [length], for rows before `end`."""
    compat.store(ref.at[rows], value.astype(ref.dtype), mask=rows < end)


def cdiv(a, b: int):
    """Divide, rounding up; for numbers of 0 or more, traced or not."""
    return (a + (b - 1)) // b


def _place(ref, rows, end, head, columns):
    first, count = columns or (0, ref.shape[-1])
    tile_width = width(count)
    mask = jnp.broadcast_to((rows < end)[:, None], (rows.shape[0], tile_width))
    columns = indices(tile_width, first)
    if count != tile_width:
        mask = mask & (columns < first + count)[None, :]
    where = (rows[:, None], columns[None, :])
    return ref.at[where if head is None else (where[0], head, where[1])], mask
