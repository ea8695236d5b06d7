"""Tile sizes: how each kernel cuts its work. An op's heuristic.py chooses them by default."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTiles:
    """Tile sizes of a kernel with tiles of queries and of keys."""

    block_q: int  # queries of one head per tile; a power of two
    block_kv: int  # tokens per tile of keys; a power of two
    num_warps: int
    num_stages: int  # tiles in flight from memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBackwardTiles:
    """Tile sizes of attention with a gradient."""

    forward: AttentionTiles
    backward: AttentionTiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """Tile sizes of the decode kernel."""

    block_kv: int  # tokens per tile of keys; a power of two
    num_splits: int  # programs that share the keys of one KV head and row
    num_warps: int
    num_stages: int  # tiles in flight from memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeTiles:
    """Tile sizes of the merging kernel."""

    block_parts: int  # parts that are read at once; a power of two
    block_columns: int  # channels per program; a power of two
    num_warps: int
    num_stages: int  # tiles in flight from memory at once


def _attention_tiles(
    shapes: Sequence[tuple[int, int, int]], stages: Sequence[int]
) -> tuple[AttentionTiles, ...]:
    """Return all combinations of (block_q, block_kv, num_warps) and num_stages."""
    return tuple(
        AttentionTiles(
            block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages
        )
        for (block_q, block_kv, num_warps), num_stages in itertools.product(shapes, stages)
    )


# Tile sizes that may be faster than those chosen (benchmarks.gpu.block_sweep times them): for
# queries that walk all earlier keys, and for windows and gradients.
LONG_WALKS = _attention_tiles(
    ((128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (128, 32, 4), (64, 128, 4)), (3, 2, 4)
)
SHORT_WALKS = _attention_tiles(
    ((64, 64, 4), (64, 32, 4), (128, 64, 8), (64, 64, 8), (128, 32, 4), (32, 32, 4)), (2, 3, 1)
)
