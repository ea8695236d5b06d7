"""The cost of a case is what its kernels do: they are run with a counter in every load and dot."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import compat, masks
from kernels.all_cases import CASES
from kernels.full.cases import FullCase
from kernels.gpu import NONE
from kernels.merge.cases import MergeCase
from kernels.packed import zeros

SMALL = {
    f"{op}: {name}": case
    for op, cases in CASES.items()
    for name, case in cases.items()
    if not case.compile_only
}


@pytest.fixture
def counted(monkeypatch):
    """Count bytes that kernels load and store, mask by mask, and the operations of their dots."""
    counts = collections.Counter()

    def add(what, number):
        jax.debug.callback(lambda x: counts.update({what: int(x)}), number)

    def load(at, *, mask, other, plain=compat.load):
        out = plain(at, mask=mask, other=other)
        add("bytes", jnp.sum(mask, dtype=jnp.int32) * out.dtype.itemsize)
        return out

    def store(at, value, *, mask, plain=compat.store):
        add("bytes", jnp.sum(mask, dtype=jnp.int32) * value.dtype.itemsize)
        plain(at, value, mask=mask)

    def dot_general(a, b, dimensions, *, plain=jax.lax.dot_general, **options):
        out = plain(a, b, dimensions, **options)
        summed = np.prod([a.shape[axis] for axis in dimensions[0][0]])
        add("flops", jnp.int32(2 * out.size * summed))
        return out

    monkeypatch.setattr(compat, "load", load)
    monkeypatch.setattr(compat, "store", store)
    monkeypatch.setattr(jax.lax, "dot_general", dot_general)
    return counts


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_schedule_is_what_the_kernels_do(case, counted):
    sizes = case.block_sizes(gpu=NONE)
    jax.block_until_ready(case.run(*case.draw(), implementation="interpret", block_sizes=sizes))
    jax.effects_barrier()
    cost = case.cost(gpu=NONE)
    assert counted["bytes"] == cost.scheduled_bytes
    # Merging multiplies no matrices, and only their products are counted.
    assert counted["flops"] == (0 if isinstance(case, MergeCase) else cost.scheduled_flops)


def _mask(case, past):
    """Return visibility [query, key] of a row with `past` tokens before its queries."""
    length = getattr(case, "length", 1)
    queries, keys = past + jnp.arange(length), jnp.arange(past + length)
    if not hasattr(case, "sink"):
        return np.asarray(masks.causal(queries, keys))
    return np.asarray(masks.streaming(queries, keys, sink_size=case.sink, recent_size=case.recent))


def _packed_vector(case):
    """Return bytes of a token's key or value, on average: those of what is stored, per token."""
    both = [zeros((1, 1, 64, case.head_dim), layout) for layout in case.layouts]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(both)) / 64 / 2


def _pasts(case):
    if hasattr(case, "slots"):
        return case.offsets if hasattr(case, "offsets") else [n - 1 for n in case.lengths if n]
    return getattr(case, "lengths", ()) or (0,) * case.batch


ATTENTION = {name: case for name, case in SMALL.items() if not isinstance(case, MergeCase)}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_least_work_is_that_of_the_visible_pairs(case):
    seen = [_mask(case, past) for past in _pasts(case)]
    queries = sum(mask.shape[0] for mask in seen)
    if hasattr(case, "slots") and not hasattr(case, "offsets"):
        queries = len(case.lengths)  # empty rows have an output too
    pairs = sum(mask.sum() for mask in seen)
    keys = sum(mask.any(axis=0).sum() for mask in seen)
    vector = case.head_dim * case.itemsize
    q, lse = queries * case.q_heads * vector, 4 * case.q_heads
    kv = keys * case.kv_heads * (_packed_vector(case) if hasattr(case, "bits") else vector)
    gradient = getattr(case, "gradient", False)
    if isinstance(case, FullCase) and not gradient:
        lse = 0  # nobody gets it
    cost = case.cost(gpu=NONE)
    # Reads q, k, v and writes out and lse; backward reads all five and d_out, writes three.
    forward = 2 * q + 2 * kv + lse * queries
    backward = 4 * q + 4 * kv + lse * queries
    assert cost.num_bytes == forward + backward * gradient
    products = 7 if gradient else 2  # q.k, p.v; then q.k again, and four of gradients
    assert cost.flops == products * 2 * pairs * case.q_heads * case.head_dim
    assert cost.flops <= cost.scheduled_flops


def test_least_work_of_merging_reads_all_parts_once():
    case = MergeCase(parts=3, length=10, q_heads=2, head_dim=8)
    cost = case.cost(gpu=NONE)
    outs, lses = 3 * 10 * 2 * 8, 3 * 10 * 2
    assert cost.num_bytes == 2 * outs + 4 * lses + (2 * outs + 4 * lses) / 3
    assert cost.flops == 2 * outs
