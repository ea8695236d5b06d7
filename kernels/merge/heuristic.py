"""Tile sizes of the merging kernel."""

from kernels.gpu import Gpu
from kernels.tile_io import cdiv, power_of_two, width
from kernels.tiles import MergeTiles

_MAX_TILE = 2048  # float32 numbers in a tile: 16 per thread of 4 warps


def choose_tiles(*, rows: int, head_dim: int, gpu: Gpu) -> MergeTiles:
    """Choose tile sizes: few rows per program while that keeps all cores busy."""
    columns = width(head_dim)
    per_core = power_of_two(max(1, cdiv(rows, 4 * gpu.num_cores)))
    block_rows = min(per_core, max(1, _MAX_TILE // columns))
    return MergeTiles(
        block_rows=block_rows, num_warps=1 if block_rows * columns <= 512 else 4, num_stages=3
    )
