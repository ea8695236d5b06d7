"""Tile sizes of the merging kernel."""

import dataclasses

from kernels.gpu import Gpu
from kernels.tiles import cdiv, power_of_two, width

_MOST_NUMBERS = 2048  # of a tile, in float32: 16 a thread of 4 warps


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How the merging kernel cuts its work."""

    block_rows: int  # rows per program; a power of two
    num_warps: int
    num_stages: int  # parts on their way from memory at once


def heuristic(*, rows: int, head_dim: int, gpu: Gpu) -> BlockSizes:
    """Choose tile sizes: few rows per program while that keeps all cores busy."""
    columns = width(head_dim)
    per_core = power_of_two(max(1, cdiv(rows, 4 * gpu.num_cores)))
    block_rows = min(per_core, max(1, _MOST_NUMBERS // columns))
    return BlockSizes(
        block_rows=block_rows, num_warps=1 if block_rows * columns <= 512 else 4, num_stages=3
    )
