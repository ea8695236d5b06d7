"""Tile sizes of the kernels that read packed keys and values."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.decode.config import BlockSizes as DecodeBlockSizes
from kernels.decode.config import num_splits
from kernels.gpu import Gpu
from kernels.packed.layout import Layout
from kernels.tiles import MIN_ROWS, BlockSizes


def decode_heuristic(
    *,
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: DTypeLike,
    layout: Layout,
    gpu: Gpu,
) -> DecodeBlockSizes:
    """Choose tile sizes of decoding: splits as for other caches."""
    block_kv = _block_kv(head_dim, dtype, layout)
    return DecodeBlockSizes(
        block_kv=block_kv,
        num_splits=num_splits(
            batch=batch, kv_heads=kv_heads, slots=slots, block_kv=block_kv, gpu=gpu
        ),
        num_warps=4 if layout.bits == 2 else 8,  # with 4, 64 codes of 8 bits spill here and there
        num_stages=3,
    )


def prefill_heuristic(*, head_dim: int, dtype: DTypeLike, layout: Layout) -> BlockSizes:
    """Choose tile sizes of prefill: what fits registers without spilling.

    What the compiler makes of a tile is erratic: smaller ones spill where larger ones do not, and
    another ptxas spills elsewhere. These were compiled with all head_dims, on A100 and H200.
    """
    wide = jnp.dtype(dtype).itemsize > 2
    block_q = MIN_ROWS if head_dim > 128 or (wide and layout.bits == 2) else 32
    block_kv = 16 if layout.bits == 2 or (wide and layout.bits == 4) else 32
    return BlockSizes(block_q=block_q, block_kv=block_kv, num_warps=8, num_stages=2)


def _block_kv(head_dim: int, dtype: DTypeLike, layout: Layout) -> int:
    if layout.bits == 2:
        return 16  # 32 spill here and there: on H200, and on A100 as some ptxas see it
    return 64 if head_dim <= 128 and jnp.dtype(dtype).itemsize == 2 else 32
