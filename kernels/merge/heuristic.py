"""Tile sizes of the merging kernel."""

from kernels.gpu import Gpu
from kernels.tile_io import cdiv, power_of_two, width
from kernels.tiles import MergeTiles

_MOST_NUMBERS = 4096  # of a tile: 128 per thread
_FEWEST_COLUMNS = 32  # 128 bytes in float32


def choose_tiles(*, parts: int, rows: int, head_dim: int, gpu: Gpu) -> MergeTiles:
    """Choose tile sizes: few channels per program where there are few rows, for all cores."""
    columns = width(head_dim)
    while columns > _FEWEST_COLUMNS and rows * cdiv(head_dim, columns) < gpu.num_cores:
        columns //= 2
    block_parts = min(_MOST_NUMBERS // columns, power_of_two(parts))
    return MergeTiles(
        block_parts=block_parts,
        block_columns=columns,
        num_warps=1,  # measured on an H200: 4 took 40% longer over 108 parts
        num_stages=2,
    )
