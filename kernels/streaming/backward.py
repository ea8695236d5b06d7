"""Gradients of attention within a sequence, streaming or full, for the Triton lowering.

With p = softmax(scale * q k^T) under the mask and delta = sum_h(d_out * out), as in
FlashAttention-2 (2307.08691):

    d_v = p^T d_out,  d_s = p * (d_out v^T - delta) * scale,  d_q = d_s k,  d_k = d_s^T q

where p is computed again, tile by tile, from the lse that the forward pass left. Three kernels, so
that every gradient is summed in the registers of one program and written once:

- d_q: program (i, n, b) owns block_q queries of head n and walks the sinks and its window. The last
  queries come first: without a window they have the most to walk.
- d_k, d_v of keys outside the sinks: program (j, k, b) owns block_kv keys of KV head k and walks
  the queries whose windows hold them, of all heads of its group.
- d_k, d_v of the sinks: all later queries see them, so their walk is cut into splits, whose sums
  (float32, sink_size tokens each) are added outside.

Measured: not yet.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import compat, masks, tiles
from kernels.tiles import BlockSizes

MAX_SINK_SPLITS = 16  # kernels.streaming.schedule counts them too


def backward(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    out: Float[Array, "batch length q_heads head_dim"],
    lse: Float[Array, "batch length q_heads"],
    d_out: Float[Array, "batch length q_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    block_sizes: BlockSizes,
    interpret: bool,
    name: str,
) -> tuple[
    Float[Array, "batch length q_heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
]:
    """Return the gradients of q, k and v, given that of the output.

    See kernels.streaming_attention; no sinks and a window of the whole length are full attention.
    The kernels' names begin with `name`.
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group = num_q_heads // num_kv_heads
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    num_q_blocks = tiles.cdiv(length, block_q)
    sink_size = min(sink_size, length)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    # Numbers of one head lie together.
    operands = (q, k, v, d_out, jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2))
    call = functools.partial(
        compat.pallas_call,
        num_warps=block_sizes.num_warps,
        num_stages=block_sizes.num_stages,
        interpret=interpret,
    )
    sizes = {
        "sink_size": sink_size,
        "recent_size": recent_size,
        "softmax_scale": softmax_scale,
        "block_sizes": block_sizes,
    }

    q_spec = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n, 0))
    kv_of_q = pl.BlockSpec((None, length, None, head_dim), lambda i, n, b: (b, 0, n // group, 0))
    number_spec = pl.BlockSpec((None, None, length), lambda i, n, b: (b, n, 0))
    d_q = call(
        functools.partial(_q_kernel, **sizes),
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
        functools.partial(_window_kernel, **sizes),
        name=f"{name}_dkv",
        grid=(tiles.cdiv(length, block_kv), num_kv_heads, batch),
        in_specs=in_specs,
        out_specs=[kv_spec, kv_spec],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
    )(*operands)
    if not sink_size:
        return d_q, d_k, d_v

    num_splits = max(1, min(MAX_SINK_SPLITS, num_q_blocks // 2))
    sink_blocks = tiles.cdiv(sink_size, block_kv)
    partial_spec = pl.BlockSpec(
        (None, None, sink_size, None, head_dim), lambda i, k, b: (i // sink_blocks, b, 0, k, 0)
    )
    partial_shape = (num_splits, batch, sink_size, num_kv_heads, head_dim)
    sinks = call(
        functools.partial(_sink_kernel, **sizes, num_splits=num_splits),
        name=f"{name}_dsink",
        grid=(num_splits * sink_blocks, num_kv_heads, batch),
        in_specs=in_specs,
        out_specs=[partial_spec, partial_spec],
        out_shape=[jax.ShapeDtypeStruct(partial_shape, jnp.float32)] * 2,
    )(*operands)
    # The window's kernel left zeros where the sinks are.
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
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    block_sizes: BlockSizes,
):
    block_q, block_kv = block_sizes.block_q, block_sizes.block_kv
    length = q_ref.shape[0]
    first_row = (pl.num_programs(0) - 1 - pl.program_id(0)) * block_q
    rows = tiles.indices(block_q, first_row)
    q = tiles.load(q_ref, rows, end=length)
    d_out = tiles.load(d_out_ref, rows, end=length)
    lse = tiles.load_vector(lse_ref, rows, end=length)
    delta = tiles.load_vector(delta_ref, rows, end=length)

    def walk(d_q, *, first, end, window: bool):
        def add_block(index, d_q):
            keys = tiles.indices(block_kv, index * block_kv)
            k = tiles.load(k_ref, keys, end=length)
            v = tiles.load(v_ref, keys, end=length)
            mask = masks.streaming(rows, keys, sink_size=sink_size, recent_size=recent_size)
            mask = mask & ((keys >= sink_size) == window)[None, :]
            _, d_scores = _tile(q, k, v, d_out, lse, delta, mask, softmax_scale=softmax_scale)
            return d_q + _product(d_scores.astype(k.dtype), k, (1, 0))

        return jax.lax.fori_loop(first // block_kv, tiles.cdiv(end, block_kv), add_block, d_q)

    end = jnp.minimum(first_row + block_q, length)
    d_q = jnp.zeros(q.shape, jnp.float32)
    if sink_size:
        d_q = walk(d_q, first=0, end=jnp.minimum(end, sink_size), window=False)
    first = jnp.maximum(first_row - (recent_size - 1), 0)
    d_q = walk(d_q, first=first, end=end, window=True)
    tiles.store(d_q_ref, rows, d_q, end=length)


def _window_kernel(*refs, sink_size: int, recent_size: int, block_sizes: BlockSizes, **sizes):
    """Refs: as _walk_queries takes them, then d_k, d_v [length, head_dim]."""
    *inputs, d_k_ref, d_v_ref = refs
    block_q, length = block_sizes.block_q, d_k_ref.shape[0]
    first_key = pl.program_id(0) * block_sizes.block_kv
    keys = tiles.indices(block_sizes.block_kv, first_key)
    end = jnp.minimum(first_key + block_sizes.block_kv + recent_size - 1, length)
    only_sinks = first_key + block_sizes.block_kv <= sink_size
    d_k, d_v = _walk_queries(
        *inputs,
        keys,
        counted=keys >= sink_size,
        first=first_key // block_q,
        end=jnp.where(only_sinks, 0, tiles.cdiv(end, block_q)),
        sink_size=sink_size,
        recent_size=recent_size,
        block_sizes=block_sizes,
        **sizes,
    )
    tiles.store(d_k_ref, keys, d_k, end=length)
    tiles.store(d_v_ref, keys, d_v, end=length)


def _sink_kernel(*refs, sink_size: int, block_sizes: BlockSizes, num_splits: int, **sizes):
    """Refs: as _walk_queries takes them, then this split's d_k, d_v [sink_size, head_dim]."""
    *inputs, d_k_ref, d_v_ref = refs
    sink_blocks = tiles.cdiv(sink_size, block_sizes.block_kv)
    keys = tiles.indices(
        block_sizes.block_kv, (pl.program_id(0) % sink_blocks) * block_sizes.block_kv
    )
    num_q_blocks = tiles.cdiv(inputs[0].shape[0], block_sizes.block_q)
    per_split = tiles.cdiv(num_q_blocks, num_splits)
    first = (pl.program_id(0) // sink_blocks) * per_split
    d_k, d_v = _walk_queries(
        *inputs,
        keys,
        counted=keys < sink_size,
        first=first,
        end=jnp.minimum(first + per_split, num_q_blocks),
        sink_size=sink_size,
        block_sizes=block_sizes,
        **sizes,
    )
    tiles.store(d_k_ref, keys, d_k, end=sink_size)
    tiles.store(d_v_ref, keys, d_v, end=sink_size)


def _walk_queries(
    q_ref,  # [length, group, head_dim]
    k_ref,  # [length, head_dim]
    v_ref,  # [length, head_dim]
    d_out_ref,  # [length, group, head_dim]
    lse_ref,  # [group, length]
    delta_ref,  # [group, length]
    keys,
    *,
    counted,
    first,
    end,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    block_sizes: BlockSizes,
):
    """Return d_k and d_v of a tile of keys from query blocks first .. end - 1 of all heads."""
    length, group = q_ref.shape[:2]
    k = tiles.load(k_ref, keys, end=length)
    v = tiles.load(v_ref, keys, end=length)

    def add_block(index, gradients):
        d_k, d_v = gradients
        head = index % group
        rows = tiles.indices(block_sizes.block_q, (index // group) * block_sizes.block_q)
        q = tiles.load(q_ref, rows, end=length, head=head)
        d_out = tiles.load(d_out_ref, rows, end=length, head=head)
        lse = tiles.load_vector(lse_ref, rows, end=length, head=head)
        delta = tiles.load_vector(delta_ref, rows, end=length, head=head)
        mask = masks.streaming(rows, keys, sink_size=sink_size, recent_size=recent_size)
        mask = mask & counted[None, :] & (rows < length)[:, None]
        p, d_scores = _tile(q, k, v, d_out, lse, delta, mask, softmax_scale=softmax_scale)
        d_k += _product(d_scores.astype(q.dtype), q, (0, 0))
        d_v += _product(p.astype(q.dtype), d_out, (0, 0))
        return d_k, d_v

    nothing = jnp.zeros(k.shape, jnp.float32)
    return jax.lax.fori_loop(first * group, end * group, add_block, (nothing, nothing))


def _tile(q, k, v, d_out, lse, delta, mask, *, softmax_scale: float):
    """Return the weights and the gradient of the scores of one tile [queries, keys], in float32."""
    scores = _product(q, k, (1, 1)) * softmax_scale
    p = jnp.where(mask, jnp.exp(scores - lse[:, None]), 0.0)
    d_p = _product(d_out, v, (1, 1))
    return p, p * (d_p - delta[:, None]) * softmax_scale


def _product(a, b, axes: tuple[int, int]):
    """Multiply two matrices over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
