"""Tile sizes of full attention: those of the kernels that it shares with other ops."""

from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.prefill import heuristic as prefill
from kernels.streaming import heuristic as streaming
from kernels.tiles import ForwardBackwardTiles


def choose_tiles(*, length: int, head_dim: int, dtype: DTypeLike, gpu: Gpu) -> ForwardBackwardTiles:
    """Choose tile sizes: forward as in prefill, backward as in streaming attention."""
    sizes = {"length": length, "head_dim": head_dim, "dtype": dtype, "gpu": gpu}
    return ForwardBackwardTiles(
        forward=prefill.choose_tiles(**sizes), backward=streaming.choose_tiles(**sizes).backward
    )
