"""Tile sizes of the decode kernel."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.packed import Layout
from kernels.tile_io import cdiv, width
from kernels.tiles import DecodeTiles


def choose_tiles(
    *,
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: DTypeLike,
    gpu: Gpu,
    layout: Layout | None = None,
) -> DecodeTiles:
    """Choose tile sizes that do not spill, for keys in `dtype` or packed in `layout`."""
    itemsize, num_warps = jnp.dtype(dtype).itemsize, 4
    if layout is None:
        block_kv = 64 if itemsize * width(head_dim) <= 256 else 32
    elif layout.bits == 2:
        block_kv = 16  # 32 spill on H200 in some cases, and on A100 with some versions of ptxas
    else:
        block_kv = 64 if itemsize == 2 and head_dim <= 128 else 32
        num_warps = 8  # with 4, tiles of 64 int8 keys spill in some cases
    # Every core gets a few programs, whose loads overlap, as long as each has two tiles.
    splits = min(cdiv(4 * gpu.num_cores, batch * kv_heads), cdiv(slots, 2 * block_kv))
    return DecodeTiles(
        block_kv=block_kv, num_splits=max(1, splits), num_warps=num_warps, num_stages=3
    )
