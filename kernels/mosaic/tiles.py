"""Tile sizes of the Mosaic kernels, by shared memory: 227 KiB on a Hopper."""

import dataclasses
import itertools

from jaxtyping import Array

from kernels.gpu import Gpu
from kernels.limits import Refusal
from kernels.mosaic import reader
from kernels.mosaic.work import ROWS
from kernels.packed import Packed
from kernels.tile_io import cdiv
from kernels.tiles import AttentionTiles, DecodeTiles, ForwardBackwardTiles


def for_attention(*, length: int, head_dim: int, block_kv: int = 128) -> AttentionTiles:
    """Choose tile sizes for `length` queries of a head: two warpgroups of 64, one for a few."""
    return AttentionTiles(
        block_q=ROWS if length <= ROWS else 2 * ROWS,
        block_kv=block_kv,
        num_warps=8 if length <= ROWS else 12,
        num_stages=2 if head_dim * block_kv > 64 * 128 else 3,
    )


def for_sequence(*, length: int, head_dim: int, window: int | None = None) -> ForwardBackwardTiles:
    """Choose tile sizes for a sequence; smaller ones where a window cuts most of them."""
    block_kv = 64 if window is not None and window < 1024 else 128
    forward = for_attention(length=length, head_dim=head_dim, block_kv=block_kv)
    return ForwardBackwardTiles(forward=forward, backward=forward)


def for_decode(
    *, batch: int, kv_heads: int, slots: int, head_dim: int, packed: bool, gpu: Gpu
) -> DecodeTiles:
    """Choose tile sizes for one query per row."""
    block_kv = 64
    splits = min(cdiv(2 * gpu.num_cores, batch * kv_heads), cdiv(slots, 2 * block_kv))
    return DecodeTiles(
        block_kv=block_kv,
        num_splits=max(1, splits),
        num_warps=8,
        num_stages=2 if head_dim > 64 and not packed else 4,
    )


def decode_candidates(
    *, batch: int, kv_heads: int, slots: int, head_dim: int, packed: bool, gpu: Gpu
) -> list[DecodeTiles]:
    """Return tile sizes to time for one query per row, the choice of `for_decode` first."""
    sizes = {"batch": batch, "kv_heads": kv_heads, "slots": slots}
    chosen = for_decode(**sizes, head_dim=head_dim, packed=packed, gpu=gpu)
    splits = {
        max(1, min(cdiv(waves * gpu.num_cores, batch * kv_heads), cdiv(slots, ROWS)))
        for waves in (1, 2, 4, 8)
    }
    return [chosen] + [
        dataclasses.replace(chosen, block_kv=block_kv, num_splits=num_splits, num_stages=stages)
        for block_kv, num_splits, stages in itertools.product(
            (ROWS,) if packed else (ROWS, 2 * ROWS), sorted(splits), (2, 3, 4)
        )
    ]


def attention_candidates(chosen: AttentionTiles) -> list[AttentionTiles]:
    """Return tile sizes to time for a chunk, those that were chosen first.

    Some of them take more shared memory than there is, and do not compile.
    """
    found = itertools.product((ROWS, 2 * ROWS), (ROWS, 2 * ROWS), (2, 3, 4))
    return [chosen] + [
        AttentionTiles(
            block_q=block_q,
            block_kv=block_kv,
            num_warps=4 * (block_q // ROWS + 1),
            num_stages=stages,
        )
        for block_q, block_kv, stages in found
    ]


def sequence_candidates(chosen: ForwardBackwardTiles) -> list[ForwardBackwardTiles]:
    """Return tile sizes to time for a sequence, those that were chosen first."""
    return [
        dataclasses.replace(chosen, forward=forward)
        for forward in attention_candidates(chosen.forward)
    ]


def decode_refusal(q: Array, k: Array | Packed, v: Array | Packed) -> Refusal | None:
    """Return why the decode kernel cannot read a cache; None if it can."""
    group = q.shape[1] // k.shape[1]
    if group > ROWS:
        reason = f"{group} query heads read one KV head, the Mosaic kernel takes {ROWS}"
        return Refusal(reason=reason)
    for x in (k, v):
        read = reader.of(x, q)
        if isinstance(read, reader.Unpacking) and not read.readable:
            stored = f"{read.layout.bits} bits of head_dim {read.head_dim}"
            reason = f"Mosaic kernels do not read {stored}"
            return Refusal(reason=reason)
    return None
