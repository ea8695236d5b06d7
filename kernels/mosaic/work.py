"""What a Mosaic kernel's program is told: its sizes, its queries, and the tiles that they meet."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from kernels.mosaic import reader
from kernels.mosaic.reader import Reader
from kernels.mosaic.source import Tile
from kernels.packed import Packed
from kernels.pages import Pages
from kernels.tile_io import Scalar
from kernels.tiles import AttentionTiles, DecodeTiles

ROWS = 64  # queries of a warpgroup: the rows of its matrix instructions
ALIGNED = 8  # TMA reads whole groups of so many vectors, so arrays must consist of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Consecutive tiles of some keys and values."""

    tile: Tile
    keys: Sequence[jax.Ref]  # what is stored of them (kernels.mosaic.reader)
    values: Sequence[jax.Ref]
    first: Scalar
    end: Scalar
    mask: Callable[[Array, Array], Array] | None  # of the program's rows, and slots; None: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one program does; refs are functions of the warpgroup that multiplies."""

    queries: Callable[[Scalar], Any]  # [64, head_dim]
    out: Callable[[Scalar], Any]  # [64 or fewer, head_dim]
    lse: Callable[[Scalar], Any]  # [64]
    ranges: Sequence[Range]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a program."""

    workers: int  # warpgroups that multiply
    block_kv: int
    num_stages: int
    head_dim: int
    dtype: DTypeLike  # of queries
    keys: Reader
    values: Reader
    softmax_scale: float

    @property
    def packed(self) -> bool:
        return isinstance(self.keys, reader.Unpacking)

    @classmethod
    def of(
        cls,
        tiles: AttentionTiles | DecodeTiles,
        block_q: int,
        q: Array,
        k: Array | Packed,
        v: Array | Packed,
        softmax_scale: float,
    ) -> "Shape":
        """Return the sizes for some tiles.

        Raises:
          ValueError: the tiles are not those of warpgroups.
        """
        # One warpgroup unpacks a tile, which is a block of 2 bits.
        sizes = (ROWS,) if isinstance(k, Packed) else (ROWS, 2 * ROWS)
        if block_q not in sizes or tiles.block_kv not in sizes:
            raise ValueError(f"{tiles} have not 64 or, unpacked, 128 queries by 64 or 128 keys")
        return cls(
            workers=block_q // ROWS,
            block_kv=tiles.block_kv,
            num_stages=tiles.num_stages,
            head_dim=q.shape[-1],
            dtype=q.dtype,
            keys=reader.of(k, q),
            values=reader.of(v, q),
            softmax_scale=softmax_scale,
        )


def halves(refs: Sequence[jax.Ref]) -> tuple[Sequence[jax.Ref], Sequence[jax.Ref]]:
    """Return what is stored of keys, and of values."""
    return refs[: len(refs) // 2], refs[len(refs) // 2 :]


def name(op: str, k: Array | Packed, pages: Pages | None) -> str:
    """Return the name of a kernel."""
    packed, paged = "_packed" * isinstance(k, Packed), "_paged" * (pages is not None)
    return f"{op}{packed}{paged}_mosaic"


def cached(x: Array | Packed) -> list[Array]:
    """Return what is stored of cached keys or values, as inputs of a kernel.

    Scales by channel are 16 bytes long anyway.
    """
    by_channel = isinstance(x, Packed) and x.layout.by == "channel"
    return [y if by_channel else aligned(y, axis=2) for y in reader.arrays(x)]


def aligned(x: Array, *, axis: int) -> Array:
    """Return an array whose axis is a multiple of what TMA reads; padded, so a copy, if need be."""
    missing = -x.shape[axis] % ALIGNED
    return jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)]) if missing else x
