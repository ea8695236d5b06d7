"""How the kernels of decode and prefill read a cache, in whatever format it is stored.

Both ops share out the work, and walk a head's keys block by block, in one way for all caches. What
a block does to its queries' running softmax depends on the format; that is a Reader:
`UnpackedReader` here, kernels.packed.reader.PackedReader for packed numbers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels import online_softmax, tile_io
from kernels.tile_io import Ref, Scalar
from kernels.tiles import AttentionTiles, DecodeTiles

Mask = Callable[[Int[Array, " positions"]], Bool[Array, "#rows positions"]]


class Reader(Protocol):
    """The keys and values of one head, inside a kernel."""

    @property
    def slots(self) -> int:
        """Slots of the cache."""
        ...

    def load_queries(self, ref: jax.Ref, rows: Int[Array, " rows"], *, end: Scalar) -> Any:
        """Read the rows before `end` of a ref [length, head_dim]."""
        ...

    def start(self, queries: Any) -> Any:
        """Return the state before the first block."""
        ...

    def add_block(
        self, index: Scalar, state: Any, queries: Any, mask: Mask | None, *, end: Scalar
    ) -> Any:
        """Let every row see the keys of block `index` that its mask allows.

        No mask allows all. Slots from `end` on are not read.
        """
        ...

    def store(
        self,
        state: Any,
        out_ref: jax.Ref,
        lse_ref: jax.Ref,
        rows: Int[Array, " rows"],
        *,
        end: Scalar,
    ) -> None:
        """Write output and lse of the rows before `end`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """A cache as inputs of a kernel: arrays, their block specs, and the reader of their refs."""

    arrays: Sequence[Array]
    specs: Sequence[pl.BlockSpec]  # of one row and head
    reader: Callable[..., Reader]  # takes the refs, block_kv and softmax_scale
    name: str  # of the kernel that reads them

    def read_with(
        self, tiles: AttentionTiles | DecodeTiles, softmax_scale: float
    ) -> Callable[[Sequence[jax.Ref]], Reader]:
        """Return a function that makes a reader of the refs, given the kernel's tile sizes."""
        return functools.partial(self.reader, block_kv=tiles.block_kv, softmax_scale=softmax_scale)


def operands(
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    index_map: Callable[..., tuple[Any, Any]],
    *,
    name: str,
    heads_first: bool = True,
) -> Operands:
    """Describe keys and values that are not packed.

    Args:
      k: keys [batch, kv_heads, slots, head_dim], or [batch, slots, kv_heads, head_dim].
      v: values.
      index_map: returns row and KV head of a program, given its place in the grid.
      name: of the kernel.
      heads_first: whether kv_heads is axis 1, not 2.
    """
    if heads_first:
        block = (None, None, *k.shape[2:])
        spec = pl.BlockSpec(block, lambda *at: (*index_map(*at), 0, 0))
    else:

        def between(*at):
            row, head = index_map(*at)
            return row, 0, head, 0

        spec = pl.BlockSpec((None, k.shape[1], None, k.shape[3]), between)
    return Operands(arrays=(k, v), specs=(spec, spec), reader=UnpackedReader, name=name)


@dataclasses.dataclass(frozen=True)
class UnpackedReader:
    """Keys and values that are not packed."""

    refs: Sequence[Ref]  # keys and values, [slots, head_dim] each
    _: dataclasses.KW_ONLY
    block_kv: int
    softmax_scale: float

    @property
    def slots(self) -> int:
        return self.refs[0].shape[0]

    def load_queries(
        self, ref: jax.Ref, rows: Int[Array, " rows"], *, end: Scalar
    ) -> Float[Array, "rows width"]:
        return tile_io.load(ref, rows, end=end)

    def start(self, queries: Float[Array, "rows width"]) -> online_softmax.State:
        return online_softmax.start(queries)

    def add_block(
        self,
        index: Scalar,
        state: online_softmax.State,
        queries: Float[Array, "rows width"],
        mask: Mask | None,
        *,
        end: Scalar,
    ) -> online_softmax.State:
        positions = tile_io.indices(self.block_kv, index * self.block_kv)
        k, v = (tile_io.load(ref, positions, end=end) for ref in self.refs)
        visible = None
        if mask is not None:
            visible = jnp.broadcast_to(mask(positions), (queries.shape[0], self.block_kv))
        return online_softmax.add_block(
            state, queries, k, v, visible, softmax_scale=self.softmax_scale
        )

    def store(
        self,
        state: online_softmax.State,
        out_ref: jax.Ref,
        lse_ref: jax.Ref,
        rows: Int[Array, " rows"],
        *,
        end: Scalar,
    ) -> None:
        out, lse = online_softmax.finish(state)
        tile_io.store(out_ref, rows, out, end=end)
        tile_io.store_vector(lse_ref, rows, lse, end=end)
