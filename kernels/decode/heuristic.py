"""Tile sizes of the decode kernel."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.packed import Layout
from kernels.tile_io import cdiv, width
from kernels.tiles import DecodeTiles

_FEWEST_SLOTS = 256  # of a split


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
    itemsize, num_warps, per_core = jnp.dtype(dtype).itemsize, 4, 4
    if layout is None:
        block_kv = 64 if itemsize * width(head_dim) <= 256 else 32
    elif layout.bits == 2:
        # 32 spill on H200 in some cases, and on A100 with some versions of ptxas.
        block_kv, num_warps, per_core = 16, 2 if head_dim <= 128 else 4, 8
    else:
        # Triton lets all warps of a program do the same products of these narrow tiles.
        num_warps, per_core = 1, 12
        block_kv = 32 if layout.bits == 4 and itemsize == 2 and head_dim <= 128 else 16
    # Every core gets a few programs, whose loads overlap, as long as each has some tiles; a short
    # ring is read by one, since merging would take longer.
    splits = min(cdiv(per_core * gpu.num_cores, batch * kv_heads), slots // _FEWEST_SLOTS)
    return DecodeTiles(
        block_kv=block_kv, num_splits=max(1, splits), num_warps=num_warps, num_stages=3
    )
