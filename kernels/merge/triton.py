"""Merging of parts, for the Triton lowering.

Program (i, c) owns block_columns channels of row i. It reads block_parts parts at a time, as the
softmax of attention reads blocks of keys: running maximum, sum and output stay in registers
(float32). Every output is read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import compat, online_softmax, tile_io
from kernels.no_gradient import refuse_gradient
from kernels.tiles import MergeTiles

_NO_GRADIENT = "the kernel of merge_lse has no gradient; implementation='xla' has"


def merge_lse(
    outs: Float[Array, "parts *rows head_dim"],
    lses: Float[Array, "parts *rows"],
    *,
    tiles: MergeTiles,
    interpret: bool,
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """See kernels.merge_lse."""
    merge = functools.partial(_merge, tiles=tiles, interpret=interpret)
    return refuse_gradient(merge, _NO_GRADIENT)(outs, lses)


def _merge(
    outs: Float[Array, "parts *rows head_dim"],
    lses: Float[Array, "parts *rows"],
    *,
    tiles: MergeTiles,
    interpret: bool,
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    _, *rows, head_dim = outs.shape
    num_rows = lses[0].size
    outs, lses = outs.reshape(-1, head_dim), lses.astype(jnp.float32).reshape(-1)
    out, lse = compat.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        name="duo_merge",
        grid=(num_rows, tile_io.cdiv(head_dim, tiles.block_columns), 1),
        in_specs=[
            pl.BlockSpec(outs.shape, lambda i, _, __: (0, 0)),
            pl.BlockSpec(lses.shape, lambda i, _, __: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((num_rows, head_dim), lambda i, _, __: (0, 0)),
            pl.BlockSpec((num_rows,), lambda i, _, __: (0,)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, head_dim), outs.dtype),
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
        ],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )(outs, lses)
    return out.reshape(*rows, head_dim), lse.reshape(rows)


def _kernel(
    outs_ref,  # [parts * rows, head_dim]
    lses_ref,  # [parts * rows]
    out_ref,  # [rows, head_dim]
    lse_ref,  # [rows]
    *,
    tiles: MergeTiles,
):
    (num_rows, head_dim), row = out_ref.shape, pl.program_id(0)
    parts = lses_ref.shape[0] // num_rows
    columns = tile_io.indices(tiles.block_columns, pl.program_id(1) * tiles.block_columns)

    def add_parts(index, state):
        maximum, total, summed = state
        part = tile_io.indices(tiles.block_parts, index * tiles.block_parts)
        at, is_part = part * num_rows + row, part < parts
        mask = is_part[:, None] & (columns < head_dim)[None, :]
        out = compat.load(outs_ref.at[at[:, None], columns[None, :]], mask=mask, other=0)
        lse = compat.load(lses_ref.at[at], mask=is_part, other=0)
        lse = jnp.where(is_part, lse, -jnp.inf)
        maximum, shrink = online_softmax.rescale(maximum, jnp.max(lse))
        weights = jnp.exp(lse - maximum)
        seen = jnp.sum(out.astype(jnp.float32) * weights[:, None], axis=0)
        return maximum, total * shrink + jnp.sum(weights), summed * shrink + seen

    start = *online_softmax.start_rows((), jnp.float32), jnp.zeros(columns.shape, jnp.float32)
    blocks = tile_io.cdiv(parts, tiles.block_parts)
    maximum, total, summed = jax.lax.fori_loop(0, blocks, add_parts, start)
    divisor, lse = online_softmax.finish_rows(maximum, total)
    out = (summed / divisor).astype(out_ref.dtype)
    compat.store(out_ref.at[row, columns], out, mask=columns < head_dim)

    @pl.when(pl.program_id(1) == 0)
    def _():
        lse_ref[row] = lse
