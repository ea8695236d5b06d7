"""Tile sizes of the kernels of full attention: those of the kernels that it shares."""

from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.prefill import config as prefill
from kernels.streaming import config as streaming
from kernels.streaming.config import Config


def heuristic(*, length: int, head_dim: int, dtype: DTypeLike, gpu: Gpu) -> Config:
    """Choose tile sizes: forward as prefill, backward as streaming attention."""
    sizes = {"length": length, "head_dim": head_dim, "dtype": dtype, "gpu": gpu}
    return Config(
        forward=prefill.heuristic(**sizes), backward=streaming.heuristic(**sizes).backward
    )
