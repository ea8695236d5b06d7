"""How the Mosaic kernels read a tile of keys or values, in whatever format the cache stores it.

TMA brings a tile as it is stored; before it is multiplied, it is a matrix [block_kv, head_dim] of
the queries' dtype in shared memory. Unpacked tiles are that already. `Unpacking` turns words of 8,
4 or 2 bits per number into one: the channels of a field are neighbours (kernels.packed.layout), so
a tile of words gives `fields` blocks of columns without shuffling. Such a matrix consists of pieces
of 16 columns or more, so blocks of fewer are put beside one another before they are stored: two
fields of 8 columns are one store (head_dim 64 in 4 or 2 bits). In 2 bits the words of a block of 64
tokens hold token t and token t + 32, so they are brought twice, one copy below the other: row t of
the lower half is token t + 32.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import compat
from kernels.packed import Layout, Packed
from kernels.tile_io import Scalar

_PIECES = (64, 32, 16)  # columns, of 2 bytes: what the matrix instructions find in shared memory
_COLUMNS = 8  # that matrices in registers (Layout.WGMMA) consist of


class Stored(NamedTuple):
    """A part of a tile as it lies in shared memory."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    is_matrix: bool = False
    copies: int = 1  # of what lies in the cache, one below the other

    @property
    def slots(self) -> int:
        """How far tiles are apart in the cache."""
        return self.shape[0] // self.copies

    def places(self, room: Any) -> list[Any]:
        """Return where in shared memory the copies go."""
        if self.copies == 1:
            return [room]
        return [room.at[i * self.slots : (i + 1) * self.slots] for i in range(self.copies)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Keys or values that are not packed."""

    head_dim: int
    dtype: DTypeLike

    @property
    def columns(self) -> int:
        """Columns of the pieces that matrices in shared memory consist of: 128 bytes, or less."""
        return _piece(self.head_dim)

    def stored(self, slots: int) -> list[Stored]:
        """Return what is stored of some slots."""
        return [Stored((slots, self.head_dim), self.dtype, is_matrix=True)]

    def matrix(self, refs: Sequence[Any], stage: Scalar, room: Any) -> Any:
        """Return a tile as a matrix in shared memory."""
        del room
        return refs[0].at[stage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpacking:
    """Keys or values in 8, 4 or 2 bits; scales and zeros as kernels.packed.layout has them."""

    head_dim: int
    dtype: DTypeLike
    layout: Layout

    @property
    def columns(self) -> int:
        """Columns of the pieces that matrices in shared memory consist of, and stores too."""
        return _piece(self._fields * self._words)

    @property
    def readable(self) -> bool:
        """Whether a tile of words, which has the columns of a field, is a matrix in registers."""
        return self._words % _COLUMNS == 0

    @property
    def _words(self) -> int:
        """Words of a token, or columns of a field."""
        return self.head_dim // self.layout.fields

    @property
    def _fields(self) -> int:
        """Fields of a store: the fewest that are whole pieces together."""
        return math.lcm(self._words, _PIECES[-1]) // self._words

    @property
    def _groups(self) -> int:
        """Scales of a token."""
        return self.layout.num_scales(self.head_dim)

    def stored(self, slots: int) -> list[Stored]:
        """Return what is stored of some slots: words, scales and zeros; none is a matrix."""
        words = Stored((slots, self._words), jnp.uint32, copies=self.layout.tokens_per_word)
        if self.layout.by == "channel":
            numbers = Stored((slots // self.layout.block, self.head_dim), jnp.float16)
        else:
            numbers = Stored((slots,), jnp.float16 if self._groups == 1 else jnp.uint32)
        return [words, numbers, numbers]

    def matrix(self, refs: Sequence[Any], stage: Scalar, room: Any) -> Any:
        """Dequantise a tile into `room`, behind a fence for the matrix instructions."""
        plgpu = compat.mosaic()
        words = plgpu.load(refs[0].at[stage], layout=plgpu.Layout.WGMMA)
        if self.layout.tokens_per_word == 2:
            row = plgpu.broadcasted_iota(jnp.int32, words.shape, 0, layout=plgpu.Layout.WGMMA)
            later = jnp.uint32(self.layout.shift(0, 1))
            words = jnp.where(row < self.layout.block // 2, words, words >> later)
        per_group = self.layout.fields // (1 if self.layout.by == "channel" else self._groups)
        shape = (words.shape[0], self._fields * self._words)
        scale = zero = jnp.float32(0)
        for first in range(0, self.layout.fields, self._fields):
            fields = range(first, first + self._fields)
            columns = slice(first * self._words, fields.stop * self._words)
            if self.layout.by == "channel" or first % per_group == 0:
                scale, zero = (self._numbers(ref, stage, columns, shape) for ref in refs[1:])
            codes = jnp.concatenate([self._codes(words, field) for field in fields], axis=1)
            room[:, columns] = (codes.astype(jnp.float32) * scale + zero).astype(self.dtype)
        plgpu.commit_smem()
        return room

    def _codes(self, words: Array, field: int) -> Array:
        """Return a field of words, in the lowest bits."""
        shift = jnp.uint32(self.layout.shift(field, 0))
        return (words >> shift) & jnp.uint32(2**self.layout.bits - 1)

    def _numbers(self, ref: Any, stage: Scalar, columns: slice, shape: tuple[int, ...]) -> Array:
        """Return the scales, or zeros, of some columns of a tile, for each of their numbers."""
        plgpu = compat.mosaic()
        layout = plgpu.Layout.WGMMA
        if self.layout.by == "channel":
            numbers = plgpu.load(ref.at[stage, 0, columns], layout=layout.reduce(0))
            return lax.broadcast_in_dim(numbers.astype(jnp.float32), shape, [1])
        numbers = plgpu.load(ref.at[stage], layout=layout.reduce(1))
        if self._groups == 2:
            shift = jnp.uint32(16 * (columns.start * 2 // self.head_dim))
            numbers = lax.bitcast_convert_type((numbers >> shift).astype(jnp.uint16), jnp.float16)
        return lax.broadcast_in_dim(numbers.astype(jnp.float32), shape, [0])


Reader = Plain | Unpacking


def of(x: Array | Packed, q: Array) -> Reader:
    """Return the reader of keys or values."""
    if isinstance(x, Packed):
        return Unpacking(head_dim=q.shape[-1], dtype=q.dtype, layout=x.layout)
    return Plain(head_dim=q.shape[-1], dtype=q.dtype)


def arrays(x: Array | Packed) -> list[Array]:
    """Return what is stored, as inputs of a kernel: [rows, kv_heads, slots, ...] each."""
    if not isinstance(x, Packed):
        return [x]
    if x.layout.by == "channel":
        return list(x.leaves)
    if x.scales.shape[3] == 2:  # TMA reads 16 bytes or more, and a kernel what is next to another
        return [x.words, *(lax.bitcast_convert_type(y, jnp.uint32) for y in (x.scales, x.zeros))]
    return [x.words, *(jnp.squeeze(y, 3) for y in (x.scales, x.zeros))]


def _piece(columns: int) -> int:
    """Return the columns of the widest pieces that so many columns consist of."""
    return next(piece for piece in _PIECES if columns % piece == 0)
