"""The least work of a case, from its mask; and the tiles that its kernel really walks."""

import collections
import functools

import jax
import numpy as np
import pytest

from kernels.all_cases import named
from kernels.cached_case import LAYOUTS
from kernels.case import to_numpy
from kernels.gpu import INTERPRETER
from kernels.merge.cases import MergeCase
from kernels.packed import zeros
from kernels.tiles import AttentionTiles, ForwardBackwardTiles

ATTENTION = {
    name: case
    for name, case in named().items()
    if not case.compile_only and not name.startswith("merge")
}


def masks(case) -> list[np.ndarray]:
    """Return which query sees which slot, [batch, q_len, slots], of every part of the keys."""
    return [part.mask for part in case.parts(to_numpy(case.draw()))]


def vector_bytes(case) -> float:
    """Return the bytes of a token's key or value, packed: those of what is stored, per token."""
    if case.bits is None:
        return case.vector_bytes
    both = [zeros((1, 1, 64, case.head_dim), layout) for layout in LAYOUTS[case.bits]]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(both)) / 64 / 2


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_least_work_is_that_of_the_visible_pairs(case):
    seen = masks(case)
    queries = seen[0].shape[0] * seen[0].shape[1]
    pairs = sum(int(mask.sum()) for mask in seen)
    # A chunk's own sinks stand among its cached sinks too; they are counted once.
    keys = sum(int(mask.any(axis=1).sum()) for mask in seen)
    q = queries * case.q_heads * case.vector_bytes
    kv = keys * case.kv_heads * vector_bytes(case)
    lse = 4 * queries * case.q_heads * (case.returns_lse or case.gradient)
    # Reads q, k, v and writes out and lse; backward reads all five and d_out, writes three.
    forward = 2 * q + 2 * kv + lse
    backward = 4 * q + 4 * kv + lse
    cost = case.cost()
    assert cost.num_bytes == forward + backward * case.gradient
    products = 7 if case.gradient else 2  # q.k, p.v; then q.k again, and four of gradients
    assert cost.flops == products * 2 * pairs * case.q_heads * case.head_dim


def test_least_work_of_merging_reads_all_parts_once():
    cost = MergeCase(parts=3, length=10, q_heads=2, head_dim=8).cost()
    outs, lses = 3 * 10 * 2 * 8, 3 * 10 * 2
    assert cost.num_bytes == 2 * outs + 4 * lses + (2 * outs + 4 * lses) / 3
    assert cost.flops == 2 * outs


# ---- the tiles that kernels walk

# Each kernel's hardest by default.
COUNTED = [
    "decode: ragged rows", "decode_packed: int2, group of 7, head_dim 80",
    "full: group of 7, odd length", "full: gradient, odd length, group of 7",
    "prefill: more than one block", "prefill_packed: int2, three tokens, one before the start",
    "streaming: sink + recent + 1", "streaming: odd length, rows of many pasts",
    "streaming: gradient, group of 7, head_dim 80",
]  # fmt: skip
COUNTED_TOO = [
    "decode: empty rows", "decode_packed: int4, ragged rows", "prefill: three tokens, ragged",
    "prefill_packed: int8, group of 7, head_dim 80", "streaming: a chunk shorter than the window",
    "streaming: no sinks", "streaming: gradient, no sinks",
]  # fmt: skip


@pytest.fixture
def walked(monkeypatch):
    """Count the steps of the loops in kernels, of all programs together."""
    counts = collections.Counter()

    def fori_loop(first, end, body, state, *, plain=jax.lax.fori_loop):
        jax.debug.callback(lambda n: counts.update(tiles=max(0, int(n))), end - first)
        return plain(first, end, body, state)

    monkeypatch.setattr(jax.lax, "fori_loop", fori_loop)
    return counts


def visible_tiles(visible, queries, keys, block_q: int, block_kv: int) -> int:
    """Count the tiles that hold a pair (i, j) of positions with visible(i, j)."""
    blocks = [
        np.array_split(x, range(n, len(x), n)) for x, n in ((queries, block_q), (keys, block_kv))
    ]
    return sum(
        bool(visible(i[:, None], j[None, :]).any()) for i in blocks[0] if i.size
        for j in blocks[1] if j.size
    )  # fmt: skip


def padded(length: int, block: int) -> np.ndarray:
    return np.arange(-(-length // block) * block)


def small_tiles(case):
    """Return tile sizes that cut windows and diagonals into many tiles."""
    tiles = case.tiles(gpu=INTERPRETER)
    if hasattr(case, "slots"):
        return tiles
    small = AttentionTiles(block_q=32, block_kv=16, num_warps=4, num_stages=1)
    return ForwardBackwardTiles(forward=small, backward=small)


def expected_tiles(case, tiles) -> int:
    """Return how many tiles hold a visible pair; what lies past the end of a tile counts too."""
    if hasattr(case, "slots"):
        if not hasattr(case, "starts"):
            return case.kv_heads * sum(-(-length // tiles.block_kv) for length in case.lengths)
        size = tiles.block_q, tiles.block_kv
        return case.q_heads * sum(
            visible_tiles(
                np.greater_equal, start + padded(case.length, size[0]), np.arange(case.slots), *size
            )
            for start in case.starts
        )
    sink = min(getattr(case, "sink_size", 0), case.length)
    recent = getattr(case, "recent_size", case.length)

    def window(i, j):
        return (j <= i) & (i - j < recent)

    def both(chunk_keys, size):
        """Count the walks over whole sequences: the sinks, then the window, sinks included."""
        queries = padded(case.length, size[0])
        sinks = visible_tiles(np.greater_equal, queries, np.arange(sink), *size)
        return sinks + visible_tiles(window, queries, chunk_keys, *size)

    size = tiles.forward.block_q, tiles.forward.block_kv
    if getattr(case, "lengths", ()):
        count = 0
        for past in case.lengths:
            queries, cached = past + padded(case.length, size[0]), np.arange(-recent, 0)
            count += visible_tiles(np.greater_equal, queries, np.arange(case.sink_size), *size)
            count += visible_tiles(window, queries, past + cached, *size)
            count += visible_tiles(window, queries, past + np.arange(case.length), *size)
        return case.q_heads * count
    count = both(np.arange(case.length), size)
    if case.gradient:
        block_q, block_kv = size = tiles.backward.block_q, tiles.backward.block_kv
        only_sinks = sink // block_kv * block_kv
        keys = padded(case.length, block_kv)[only_sinks:]
        count += both(np.arange(case.length), size)  # for d_q
        count += visible_tiles(window, np.arange(case.length), keys, *size)  # for d_k and d_v
        count += -(-case.length // block_q) * -(-sink // block_kv)  # for those of the sinks
    return case.batch * case.q_heads * count


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "name", [*COUNTED, *(pytest.param(name, marks=pytest.mark.slow) for name in COUNTED_TOO)]
)
def test_kernels_walk_exactly_the_tiles_that_hold_a_visible_pair(name, walked):
    case = ATTENTION[name]
    tiles = small_tiles(case)
    run = jax.jit(functools.partial(case.run, implementation="interpret", tiles=tiles))
    jax.block_until_ready(run(*case.draw()))
    jax.effects_barrier()
    assert walked["tiles"] == expected_tiles(case, tiles)
