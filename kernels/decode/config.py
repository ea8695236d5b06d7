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
    """Choose tile sizes."""
    wide = jnp.dtype(dtype).itemsize * width(head_dim)  # bytes of a token's key
    block_kv = 64 if wide <= 256 else 32
    splits = num_splits(batch=batch, kv_heads=kv_heads, slots=slots, block_kv=block_kv, gpu=gpu)
    return BlockSizes(block_kv=block_kv, num_splits=splits, num_warps=4, num_stages=3)


def num_splits(*, batch: int, kv_heads: int, slots: int, block_kv: int, gpu: Gpu) -> int:
    """Choose how many programs share the keys of one KV head and row.

    Enough that every core of the GPU has a few, whose loads overlap; no more than leaves each two
    tiles.
    """
    return max(1, min(cdiv(4 * gpu.num_cores, batch * kv_heads), cdiv(slots, 2 * block_kv)))
