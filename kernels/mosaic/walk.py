"""The walk of all Mosaic kernels: tiles of keys and values pass by 64 or 128 queries (Hopper only).

The map of a program, which owns block_q queries of one head:

    warpgroup               does
    0 .. block_q / 64 - 1   64 queries each: scores = q k^T (wgmma), running softmax, and
                            out = shrink * out + weights v (wgmma)
    the last                loads the queries, then tile after tile of keys and values (TMA)

    shared memory (scratch.py)     holds                            barriers
    q_s  [block_q, head_dim]       queries; at the end the output   q_full: they are loaded
    k_s  [stages, block_kv, ..]    tiles of keys                    k_full, k_free per stage: it is
    v_s  [stages, block_kv, ..]    tiles of values                  loaded; all have read it
                                                                    (v_full, v_free likewise)
    p_s  [block_q, block_kv]       weights, by warpgroup            none: each reads its own
    lse_s [block_q], out_s if the output's dtype is another than that of the queries
    unpacked_k, unpacked_v         a tile of packed numbers as a    none: the only multiplying
                                   matrix, by the multiplying one   warpgroup's own, fenced

    registers of a multiplying thread: head_dim / 2 for the output, twice while it grows, and
    block_kv / 2 for the scores, all float32. Of two such warpgroups each thread gets 232, and of
    the loader 40.

Each op says which tiles these are, as ranges: what lies outside is never loaded. A tile begins at a
multiple of its size; what hangs over the end of an array is read as zeros (by TMA), masked, and not
written. Weights go through shared memory since jax's interpreter multiplies nothing else
(kernels.compat runs all of this on a CPU, with race detection). Measured: docs/gpu.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels import compat, online_softmax
from kernels.mosaic import scratch
from kernels.mosaic.work import ROWS, Shape, Work

_LOADER_REGISTERS, _WORKER_REGISTERS = 40, 232


def call(
    plan: Callable[..., Work],
    *,
    name: str,
    grid: dict[str, int],
    shape: Shape,
    out_type: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    interpret: bool,
) -> Callable[..., Any]:
    """Return a kernel; `plan` says what a program does, given refs of inputs, output and lse.

    Args:
      plan: every warpgroup calls it, and it may read numbers from the refs.
      name: of the kernel.
      grid: names and sizes of its axes, the innermost last.
      shape: sizes of a program.
      out_type: of output and lse.
      interpret: whether to run on a CPU.
    """
    return compat.mosaic_call(
        functools.partial(_kernel, plan=plan, shape=shape),
        name=name,
        grid=grid,
        num_threads=shape.workers + 1,
        out_type=out_type,
        scratch_types=scratch.of(shape, out_type[0].dtype),
        interpret=interpret,
    )


def _kernel(*refs, plan: Callable[..., Work], shape: Shape, **rooms):
    plgpu = compat.mosaic()
    warpgroup, work = lax.axis_index("warpgroup"), plan(*refs)

    @pl.when(warpgroup < shape.workers)
    def _():
        if shape.workers > 1:
            plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        _multiply(warpgroup, work, shape, **rooms)

    @pl.when(warpgroup == shape.workers)
    def _():
        if shape.workers > 1:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        _load(work, shape, **rooms)


def _load(work, shape, *, q_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free, **_):
    """Load the queries, then every tile as soon as its stage has been read."""
    plgpu = compat.mosaic()
    for worker in range(shape.workers):
        plgpu.copy_gmem_to_smem(work.queries(worker), q_s.at[worker], q_full.at[worker])

    def load(index, count, tiles):
        stage = lax.rem(count, jnp.int32(shape.num_stages))
        keys = (shape.keys, tiles.keys, k_s, k_full, k_free)
        values = (shape.values, tiles.values, v_s, v_full, v_free)
        for reader, refs, rooms, full, free in (keys, values):
            pl.when(count >= shape.num_stages)(
                functools.partial(plgpu.barrier_wait, free.at[stage])
            )
            for x, ref, room in zip(reader.stored(shape.block_kv), refs, rooms, strict=True):
                tile = tiles.tile(ref, index, x.slots)
                for to in x.places(room.at[stage]):
                    plgpu.copy_gmem_to_smem(tile, to, full.at[stage])
        return count + 1

    count = jnp.int32(0)
    for tiles in work.ranges:
        count = lax.fori_loop(tiles.first, tiles.end, functools.partial(load, tiles=tiles), count)


def _multiply(
    worker, work, shape, *, q_s, k_s, v_s, p_s, lse_s, q_full, k_full, v_full, k_free, v_free,
    out_s=None, unpacked_k=None, unpacked_v=None,
):  # fmt: skip
    """Let 64 queries see every tile; write their output and lse."""
    plgpu = compat.mosaic()
    rows, layout = (ROWS, shape.block_kv), plgpu.Layout.WGMMA
    q, p, lse = q_s.at[worker], p_s.at[worker], lse_s.at[worker]
    out = q if out_s is None else out_s.at[worker]
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, rows, layout=layout)
    plgpu.barrier_wait(q_full.at[worker])

    def product(a, b, columns):
        def run(accumulator):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))

    def add_tile(index, carry, mask):
        count, maximum, total, summed = carry
        stage = lax.rem(count, jnp.int32(shape.num_stages))
        plgpu.barrier_wait(k_full.at[stage])
        keys = shape.keys.matrix(k_s, stage, unpacked_k)
        scores = product(q, keys.T, shape.block_kv) * shape.softmax_scale
        plgpu.barrier_arrive(k_free.at[stage])
        if mask is not None:
            visible = mask(iota(0) + worker * ROWS, iota(1) + index * shape.block_kv)
            scores = jnp.where(visible, scores, -jnp.inf)
        maximum, shrink = online_softmax.rescale(maximum, scores.max(axis=1))
        weights = jnp.exp(scores - lax.broadcast_in_dim(maximum, rows, [0]))
        total = total * shrink + weights.sum(axis=1)  # here: weights need their registers no longer
        p[...] = weights.astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(v_full.at[stage])
        seen = product(p, shape.values.matrix(v_s, stage, unpacked_v), shape.head_dim)
        plgpu.barrier_arrive(v_free.at[stage])
        summed = summed * lax.broadcast_in_dim(shrink, summed.shape, [0]) + seen
        return count + 1, maximum, total, summed

    maximum, total = online_softmax.start_rows((ROWS,), jnp.float32)
    summed = jnp.zeros((ROWS, shape.head_dim), jnp.float32)
    by_row = functools.partial(plgpu.layout_cast, new_layout=layout.reduce(1))
    carry = jnp.int32(0), by_row(maximum), by_row(total), plgpu.layout_cast(summed, layout)
    for tiles in work.ranges:
        step = functools.partial(add_tile, mask=tiles.mask)
        carry = lax.fori_loop(tiles.first, tiles.end, step, carry)
    _, maximum, total, summed = carry
    divisor, lse[...] = online_softmax.finish_rows(maximum, total)
    out[...] = (summed / lax.broadcast_in_dim(divisor, summed.shape, [0])).astype(out.dtype)
    plgpu.commit_smem()
    written = work.out(worker)
    plgpu.copy_smem_to_gmem(out.at[pl.ds(0, written.shape[0])], written)
    plgpu.copy_smem_to_gmem(lse, work.lse(worker))
    plgpu.wait_smem_to_gmem(0)
