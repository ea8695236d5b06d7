"""Tile sizes of the decode kernel."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.gpu import Gpu
from kernels.tiles import cdiv, width


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How the decode kernel cuts its work."""

    block_kv: int  # tokens per tile of keys; a power of two
    num_splits: int  # programs that share the keys of one KV head and row
    num_warps: int
    num_stages: int  # tiles on their way from memory at once


def heuristic(
    *, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DTypeLike, gpu: Gpu
) -> BlockSizes:
    """Choose tile sizes.

    Enough splits that every core of the GPU has a few programs, whose loads overlap; no more than
    leaves each split two tiles.
    """
    wide = jnp.dtype(dtype).itemsize * width(head_dim)  # bytes of a token's key
    block_kv = 64 if wide <= 256 else 32
    programs = batch * kv_heads
    num_splits = min(cdiv(4 * gpu.num_cores, programs), cdiv(slots, 2 * block_kv))
    return BlockSizes(block_kv=block_kv, num_splits=max(1, num_splits), num_warps=4, num_stages=3)
