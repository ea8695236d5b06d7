"""Tile sizes of the prefill kernel."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.tile_io import MIN_ROWS, power_of_two, width
from kernels.tiles import AttentionTiles


def choose_tiles(*, length: int, head_dim: int, dtype: DTypeLike, gpu: Gpu) -> AttentionTiles:
    """Choose tile sizes that do not spill."""
    columns = width(head_dim)
    if jnp.dtype(dtype).itemsize == 4:
        block_q, block_kv = (32, 32) if columns <= 128 else (16, 16)
        num_warps, num_stages = 4, 2 if columns <= 128 else 1
    elif columns <= 128:
        # On A100, key tiles of 64 for head_dim 128 spill a few registers at lengths that are no
        # multiple of the tile.
        block_kv = 64 if columns <= 64 or gpu.is_hopper else 32
        block_q, num_warps, num_stages = 128, 8, 3
    else:
        block_q, block_kv, num_warps, num_stages = 64, 32, 8, 2
    block_q = min(block_q, max(MIN_ROWS, power_of_two(length)))
    return AttentionTiles(
        block_q=block_q,
        block_kv=block_kv,
        num_warps=num_warps if block_q >= 64 else 4,
        num_stages=num_stages,
    )
