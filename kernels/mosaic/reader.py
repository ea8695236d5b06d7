"""How the Mosaic kernels read a tile of keys or values, in whatever format the cache stores it.

TMA brings a tile as it is stored; before it is multiplied, it is a matrix [block_kv, head_dim] of
the queries' dtype in shared memory. Unpacked tiles are that already. `Unpacking` turns words of 8
or 4 bits per number into one: the channels of a field are neighbours (kernels.packed.layout), so a
tile of words gives `fields` blocks of columns without shuffling.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels import compat
from kernels.packed import Layout, Packed
from kernels.tile_io import Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Keys and values that are not packed."""

    head_dim: int
    dtype: DTypeLike

    @property
    def columns(self) -> int:
        """Columns of the pieces that matrices in shared memory consist of."""
        return 128 // jnp.dtype(self.dtype).itemsize

    def stored(self, slots: int) -> list[tuple[tuple[int, ...], DTypeLike, bool]]:
        """Return shape and dtype of what is stored of some slots, and whether it is a matrix."""
        return [((slots, self.head_dim), self.dtype, True)]

    def matrix(self, refs: Sequence[Any], stage: Scalar, room: Any) -> Any:
        """Return a tile as a matrix in shared memory."""
        del room
        return refs[0].at[stage]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpacking:
    """Keys and values in 8 or 4 bits, one scale and zero per token."""

    head_dim: int
    dtype: DTypeLike
    layout: Layout

    @property
    def columns(self) -> int:
        """Columns of the pieces that matrices in shared memory consist of: those of a field."""
        return self.head_dim // self.layout.fields

    def stored(self, slots: int) -> list[tuple[tuple[int, ...], DTypeLike, bool]]:
        """Return shape and dtype of words, scales and zeros; none is a matrix."""
        numbers = ((slots,), jnp.float16, False)
        return [((slots, self.columns), jnp.uint32, False), numbers, numbers]

    def matrix(self, refs: Sequence[Any], stage: Scalar, room: Any) -> Any:
        """Dequantise a tile into `room`, behind a fence for the matrix instructions."""
        plgpu = compat.mosaic()
        layout = plgpu.Layout.WGMMA
        words = plgpu.load(refs[0].at[stage], layout=layout)
        scale, zero = (
            lax.broadcast_in_dim(
                plgpu.load(ref.at[stage], layout=layout.reduce(1)).astype(jnp.float32),
                words.shape,
                [0],
            )
            for ref in refs[1:]
        )
        for field in range(self.layout.fields):
            shift = jnp.uint32(self.layout.shift(field, 0))
            codes = (words >> shift) & jnp.uint32(2**self.layout.bits - 1)
            columns = slice(field * self.columns, (field + 1) * self.columns)
            numbers = codes.astype(jnp.float32) * scale + zero
            room[:, columns] = numbers.astype(self.dtype)
        plgpu.commit_smem()
        return room


Reader = Plain | Unpacking


def of(k: Array | Packed, q: Array) -> Reader:
    """Return the reader of keys or values."""
    if isinstance(k, Packed):
        return Unpacking(head_dim=q.shape[-1], dtype=q.dtype, layout=k.layout)
    return Plain(head_dim=q.shape[-1], dtype=q.dtype)


def arrays(k: Array | Packed) -> list[Array]:
    """Return what is stored, as inputs of a kernel: [rows, kv_heads, slots, ...] each."""
    if not isinstance(k, Packed):
        return [k]
    return [k.words, *(jnp.squeeze(x, 3) for x in (k.scales, k.zeros))]
