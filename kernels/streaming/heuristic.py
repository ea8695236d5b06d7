"""Tile sizes of the streaming kernels."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.tile_io import MIN_ROWS, power_of_two, width
from kernels.tiles import AttentionTiles, ForwardBackwardTiles


def choose_tiles(*, length: int, head_dim: int, dtype: DTypeLike, gpu: Gpu) -> ForwardBackwardTiles:
    """Choose the largest tile sizes that fit registers and shared memory without spilling."""
    columns = width(head_dim)
    if jnp.dtype(dtype).itemsize == 4:
        # Larger tiles spill at lengths that are no multiple of the tile.
        if columns <= 128:
            forward, backward = (32, 16, 4, 2), (32, 16, 8, 1)
        else:
            forward, backward = (16, 16, 8, 2), (16, 16, 8, 1)
    elif columns <= 64:
        forward, backward = (64, 64, 4, 3), (64, 32, 4, 2)
    elif columns <= 128:
        forward = (64, 64 if gpu.is_hopper else 32, 4, 3)
        # Masked columns (head_dim 80, 96) cost registers: 4 warps spill on A100.
        backward = (64, 32, 4 if columns == head_dim else 8, 2)
    else:
        forward, backward = (64, 32, 8, 2), (32, 32, 4, 1)
    most = max(MIN_ROWS, power_of_two(length))

    def sizes(block_q: int, block_kv: int, num_warps: int, num_stages: int) -> AttentionTiles:
        return AttentionTiles(
            block_q=min(block_q, most),
            block_kv=min(block_kv, most),
            num_warps=num_warps,
            num_stages=num_stages,
        )

    return ForwardBackwardTiles(forward=sizes(*forward), backward=sizes(*backward))
