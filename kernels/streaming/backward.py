"""Gradients of attention within a sequence, streaming or full, for the Triton lowering.

With p = softmax(scale * q k^T) under the mask and delta = sum_h(d_out * out), as in
FlashAttention-2 (2307.08691):

    d_v = p^T d_out
    d_scores = p * (d_out v^T - delta) * scale
    d_q = d_scores k
    d_k = d_scores^T q

where p is computed again, tile by tile, from the lse that the forward pass left. Three kernels, so
that every gradient is summed in the registers of one program and written once:

- d_q: program (i, n, b) owns block_q queries of head n and walks the sinks and its window. The last
  queries come first: without a window they have the most to walk.
- d_k, d_v of keys outside the sinks: program (j, k, b) owns block_kv keys of KV head k and walks
  the queries whose windows hold them, of all heads of its group.
- d_k, d_v of the sinks: all later queries see them, so their walk is cut into splits, whose sums
  (float32, sink_size tokens each) are added outside the kernel.

Measured on an H200 (docs/gpu.md): full attention and its gradient, 261 TFLOP/s, half of cuDNN.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels import compat, masks, tile_io
from kernels.streaming.options import StreamingOptions

_MAX_SINK_SPLITS = 16


def backward(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    out: Float[Array, "batch length q_heads head_dim"],
    lse: Float[Array, "batch length q_heads"],
    d_out: Float[Array, "batch length q_heads head_dim"],
    *,
    options: StreamingOptions,
    name: str,
) -> tuple[
    Float[Array, "batch length q_heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
]:
    """Return the gradients of q, k and v, given that of the output.

    Args:
      q: queries.
      k: keys.
      v: values.
      out: output of the forward pass.
      lse: its logarithm of the sum of exponentials.
      d_out: gradient of the output.
      options: of the forward pass.
      name: of the kernels, which add _dq, _dkv and _dsink.
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_q_heads // num_kv_heads
    tiles = options.tiles.backward
    block_kv = tiles.block_kv
    num_q_blocks = tile_io.cdiv(length, tiles.block_q)
    sink_size = min(options.sink_size, length)
    options = dataclasses.replace(options, sink_size=sink_size)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # Heads first: the numbers of one head are adjacent.
    operands = (q, k, v, d_out, jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2))
    call = functools.partial(
        compat.pallas_call,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=options.interpret,
    )

    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    kv_of_q = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    number_spec = pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))
    d_q = call(
        functools.partial(_q_kernel, options=options),
        name=f"{name}_dq",
        grid=(num_q_blocks, num_q_heads, batch),
        in_specs=[q_spec, kv_of_q, kv_of_q, q_spec, number_spec, number_spec],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*operands)

    kv_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, k, b: (b, 0, k, 0))
    group_spec = pl.BlockSpec((None, length, group, head_dim), lambda i, k, b: (b, 0, k, 0))
    numbers_spec = pl.BlockSpec((None, group, length), lambda i, k, b: (b, k, 0))
    in_specs = [group_spec, kv_spec, kv_spec, group_spec, numbers_spec, numbers_spec]
    d_k, d_v = call(
        functools.partial(_window_kernel, options=options),
        name=f"{name}_dkv",
        grid=(tile_io.cdiv(length, block_kv), num_kv_heads, batch),
        in_specs=in_specs,
        out_specs=[kv_spec, kv_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
    )(*operands)
    if not sink_size:
        return d_q, d_k, d_v

    num_splits = max(1, min(_MAX_SINK_SPLITS, num_q_blocks // 2))
    sink_blocks = tile_io.cdiv(sink_size, block_kv)
    partial_spec = pl.BlockSpec(
        (None, None, sink_size, None, head_dim), lambda i, k, b: (i // sink_blocks, b, 0, k, 0)
    )
    partial_shape = (num_splits, batch, sink_size, num_kv_heads, head_dim)
    sinks = call(
        functools.partial(_sink_kernel, options=options, num_splits=num_splits),
        name=f"{name}_dsink",
        grid=(num_splits * sink_blocks, num_kv_heads, batch),
        in_specs=in_specs,
        out_specs=[partial_spec, partial_spec],
        out_shape=[jax.ShapeDtypeStruct(partial_shape, jnp.float32)] * 2,
    )(*operands)
    # The window's kernel wrote zeros to the sinks.
    d_k, d_v = (
        x.at[:, :sink_size].set(jnp.sum(sink, axis=0).astype(x.dtype))
        for x, sink in zip((d_k, d_v), sinks, strict=True)
    )
    return d_q, d_k, d_v


def _q_kernel(
    q_ref,  # [length, head_dim]
    k_ref,  # [length, head_dim]
    v_ref,  # [length, head_dim]
    d_out_ref,  # [length, head_dim]
    lse_ref,  # [length]
    delta_ref,  # [length]
    d_q_ref,  # [length, head_dim]
    *,
    options: StreamingOptions,
):
    sink_size, recent_size = options.sink_size, options.recent_size
    block_q, block_kv = options.tiles.backward.block_q, options.tiles.backward.block_kv
    length = q_ref.shape[0]
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    rows = tile_io.indices(block_q, first_row)
    q = tile_io.load(q_ref, rows, end=length)
    d_out = tile_io.load(d_out_ref, rows, end=length)
    lse = tile_io.load_vector(lse_ref, rows, end=length)
    delta = tile_io.load_vector(delta_ref, rows, end=length)

    def walk(d_q, *, first, end, window: bool):
        def add_block(index, d_q):
            columns = tile_io.indices(block_kv, index * block_kv)
            k = tile_io.load(k_ref, columns, end=length)
            v = tile_io.load(v_ref, columns, end=length)
            mask = masks.streaming(rows, columns, sink_size=sink_size, recent_size=recent_size)
            mask = mask & ((columns >= sink_size) == window)[None, :]
            _, d_scores = _tile(
                q, k, v, d_out, lse, delta, mask, softmax_scale=options.softmax_scale
            )
            return d_q + _product(d_scores.astype(k.dtype), k, (1, 0))

        return jax.lax.fori_loop(first // block_kv, tile_io.cdiv(end, block_kv), add_block, d_q)

    end = jnp.minimum(first_row + block_q, length)
    d_q = jnp.zeros(q.shape, jnp.float32)
    if sink_size:
        d_q = walk(d_q, first=0, end=jnp.minimum(end, sink_size), window=False)
    first = jnp.maximum(first_row - (recent_size - 1), 0)
    d_q = walk(d_q, first=first, end=end, window=True)
    tile_io.store(d_q_ref, rows, d_q, end=length)


def _window_kernel(*refs, options: StreamingOptions):
    """Refs: those of _walk_queries, then d_k and d_v [length, head_dim]."""
    inputs, (d_k_ref, d_v_ref) = refs[:6], refs[6:]
    tiles, length = options.tiles.backward, d_k_ref.shape[0]
    first_column = pl.program_id(0) * tiles.block_kv
    columns = tile_io.indices(tiles.block_kv, first_column)
    end = jnp.minimum(first_column + tiles.block_kv + options.recent_size - 1, length)
    only_sinks = first_column + tiles.block_kv <= options.sink_size
    d_k, d_v = _walk_queries(
        inputs,
        columns,
        counted=columns >= options.sink_size,
        first=first_column // tiles.block_q,
        end=jnp.where(only_sinks, 0, tile_io.cdiv(end, tiles.block_q)),
        options=options,
    )
    tile_io.store(d_k_ref, columns, d_k, end=length)
    tile_io.store(d_v_ref, columns, d_v, end=length)


def _sink_kernel(*refs, options: StreamingOptions, num_splits: int):
    """Refs: those of _walk_queries, then this split's d_k and d_v [sink_size, head_dim]."""
    inputs, (d_k_ref, d_v_ref) = refs[:6], refs[6:]
    tiles, sink_size = options.tiles.backward, options.sink_size
    sink_blocks = tile_io.cdiv(sink_size, tiles.block_kv)
    columns = tile_io.indices(tiles.block_kv, (pl.program_id(0) % sink_blocks) * tiles.block_kv)
    num_q_blocks = tile_io.cdiv(inputs[0].shape[0], tiles.block_q)
    per_split = tile_io.cdiv(num_q_blocks, num_splits)
    first = (pl.program_id(0) // sink_blocks) * per_split
    d_k, d_v = _walk_queries(
        inputs,
        columns,
        counted=columns < sink_size,
        first=first,
        end=jnp.minimum(first + per_split, num_q_blocks),
        options=options,
    )
    tile_io.store(d_k_ref, columns, d_k, end=sink_size)
    tile_io.store(d_v_ref, columns, d_v, end=sink_size)


def _walk_queries(
    refs: Sequence[jax.Ref],
    columns: Int[Array, " block_kv"],  # the keys
    *,
    counted: Bool[Array, " block_kv"],
    first: Int[Array, ""],
    end: Int[Array, ""],
    options: StreamingOptions,
):
    """Return d_k and d_v of a tile of keys from query blocks first .. end - 1 of all heads.

    Refs: q [length, group, head_dim], k and v [length, head_dim], d_out as q, lse and delta
    [group, length].
    """
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = refs
    length, group = q_ref.shape[:2]
    block_q = options.tiles.backward.block_q
    k = tile_io.load(k_ref, columns, end=length)
    v = tile_io.load(v_ref, columns, end=length)

    def add_block(index, gradients):
        d_k, d_v = gradients
        head = index % group
        rows = tile_io.indices(block_q, (index // group) * block_q)
        q = tile_io.load(q_ref, rows, end=length, head=head)
        d_out = tile_io.load(d_out_ref, rows, end=length, head=head)
        lse = tile_io.load_vector(lse_ref, rows, end=length, head=head)
        delta = tile_io.load_vector(delta_ref, rows, end=length, head=head)
        mask = masks.streaming(
            rows, columns, sink_size=options.sink_size, recent_size=options.recent_size
        )
        mask = mask & counted[None, :] & (rows < length)[:, None]
        p, d_scores = _tile(q, k, v, d_out, lse, delta, mask, softmax_scale=options.softmax_scale)
        d_k += _product(d_scores.astype(q.dtype), q, (0, 0))
        d_v += _product(p.astype(q.dtype), d_out, (0, 0))
        return d_k, d_v

    nothing = jnp.zeros(k.shape, jnp.float32)
    return jax.lax.fori_loop(first * group, end * group, add_block, (nothing, nothing))


def _tile(q, k, v, d_out, lse, delta, mask, *, softmax_scale: float):
    """Return p and d_scores of one tile [queries, keys], in float32."""
    scores = _product(q, k, (1, 1)) * softmax_scale
    p = jnp.where(mask, jnp.exp(scores - lse[:, None]), 0.0)
    d_p = _product(d_out, v, (1, 1))
    return p, p * (d_p - delta[:, None]) * softmax_scale


def _product(a, b, axes: tuple[int, int]):
    """Multiply two matrices over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
