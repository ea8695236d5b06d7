"""Merging of parts, for the Triton lowering.

Program i owns block_rows rows and walks the parts, one tile of outputs and its lses at a time, as
the softmax of attention walks blocks of keys: running maximum, sum and output stay in registers
(float32). Every number is read once.

Measured: not yet.
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
    parts, *rows, head_dim = outs.shape
    num_rows = lses[0].size
    out, lse = compat.pallas_call(
        functools.partial(_kernel, parts=parts, block_rows=tiles.block_rows),
        name="duo_merge",
        grid=(tile_io.cdiv(num_rows, tiles.block_rows), 1, 1),
        in_specs=[
            pl.BlockSpec((parts * num_rows, head_dim), lambda i, _, __: (0, 0)),
            pl.BlockSpec((parts * num_rows,), lambda i, _, __: (0,)),
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
    )(outs.reshape(-1, head_dim), lses.astype(jnp.float32).reshape(-1))
    return out.reshape(*rows, head_dim), lse.reshape(rows)


def _kernel(
    outs_ref,  # [parts * rows, head_dim]
    lses_ref,  # [parts * rows]
    out_ref,  # [rows, head_dim]
    lse_ref,  # [rows]
    *,
    parts: int,
    block_rows: int,
):
    num_rows = lse_ref.shape[0]
    rows = tile_io.indices(block_rows, pl.program_id(0) * block_rows)

    def add_part(part, state):
        maximum, total, summed = state
        first = part * num_rows
        # Rows beyond the last are those of the next part, and are not stored.
        out = tile_io.load(outs_ref, first + rows, end=first + num_rows)
        lse = tile_io.load_vector(lses_ref, first + rows, end=first + num_rows)
        maximum, shrink = online_softmax.rescale(maximum, lse)
        weight = jnp.exp(lse - maximum)
        return (
            maximum,
            total * shrink + weight,
            summed * shrink[:, None] + out.astype(summed.dtype) * weight[:, None],
        )

    nothing = jnp.zeros((block_rows, tile_io.width(out_ref.shape[1])), jnp.float32)
    state = jax.lax.fori_loop(0, parts, add_part, online_softmax.start(nothing))
    out, lse = online_softmax.finish(state)
    tile_io.store(out_ref, rows, out, end=num_rows)
    tile_io.store_vector(lse_ref, rows, lse, end=num_rows)
