"""Tile sizes of the decode kernel."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import RESERVED, Gpu
from kernels.packed import Layout
from kernels.tile_io import width
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
    itemsize, num_stages = jnp.dtype(dtype).itemsize, 3
    if layout is None:
        block_kv, num_warps = (64 if itemsize * width(head_dim) <= 256 else 32), 4
        tiles = 2 * num_stages * block_kv * width(head_dim) * itemsize
        per_core = max(1, gpu.shared_memory // (tiles + RESERVED))
    elif layout.bits == 2:
        # 32 spill on H200 in some cases, and on A100 with some versions of ptxas.
        block_kv, num_warps, per_core = 16, 2 if head_dim <= 128 else 4, 8
    else:
        # Triton lets all warps of a program do the same products of these narrow tiles. Measured on
        # an H200: tiles of 32 and 64 are slower, and so are 2 stages.
        block_kv, num_warps, per_core = 16, 1, 12
    # As many programs as the cores hold at once; more wait for others to end, which took 10% longer
    # on an H200. Rows of a batch end at different tokens, so theirs are smaller. A short ring is
    # read by one, since merging would take longer.
    per_core *= 1 if batch == 1 else 2
    splits = min(per_core * gpu.num_cores // (batch * kv_heads), slots // _FEWEST_SLOTS)
    return DecodeTiles(
        block_kv=block_kv, num_splits=max(1, splits), num_warps=num_warps, num_stages=num_stages
    )
