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
        num_warps=4,
        num_stages=3,
    )


def prefill_heuristic(*, head_dim: int) -> BlockSizes:
    """Choose tile sizes of prefill: what fits registers without spilling.

    Short chunks get no smaller tiles: of 16 queries, 2-bit keys of 64 and 128 channels spill.
    """
    block_q = 32 if head_dim <= 128 else MIN_ROWS
    return BlockSizes(block_q=block_q, block_kv=32, num_warps=8, num_stages=2)


def _block_kv(head_dim: int, dtype: DTypeLike, layout: Layout) -> int:
    if layout.bits == 2:
        return 16  # 32 spill here and there: on H200, and on A100 as some ptxas see it
    return 64 if head_dim <= 128 and jnp.dtype(dtype).itemsize == 2 else 32
