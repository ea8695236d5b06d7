"""Decode attention through XLA: what depends on how it reads the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode.cases import AWKWARD, DecodeCase
from kernels.decode.heuristic import choose_tiles
from kernels.gpu import A100, H200
from kernels.packed import INT4

TINY = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}


def run(case, *arguments):
    return jax.jit(functools.partial(case.run, implementation="xla"))(*arguments)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cut", [1, 97, 512, 600, 1024])
def test_parts_of_a_cache_merged_by_lse_give_the_whole(cut):
    case = DecodeCase(lengths=(1025, 97, 1, 0), slots=1025, **TINY)
    q, k, v, lengths = case.draw()
    whole, whole_lse = run(case, q, k, v, lengths)
    first = jnp.minimum(lengths, cut)
    parts = [
        run(case, q, k[:, :, :cut], v[:, :, :cut], first),
        run(case, q, k[:, :, cut:], v[:, :, cut:], lengths - first),
    ]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    lse = np.logaddexp(*lses)
    weights = np.exp(lses - np.where(np.isinf(lse), 0, lse))
    np.testing.assert_allclose(lse, whole_lse, atol=2e-6)
    np.testing.assert_allclose((weights[..., None] * outs).sum(0), whole, atol=2e-6)


def test_the_order_of_slots_does_not_matter():
    case = DecodeCase(lengths=(700, 600), slots=700, **TINY)
    q, k, v, lengths = case.draw()
    order = np.concatenate([np.random.default_rng(1).permutation(600), np.arange(600, 700)])
    out, lse = run(case, q, k, v, lengths)
    shuffled = run(case, q, k[:, :, order], v[:, :, order], lengths)
    np.testing.assert_allclose(shuffled[0], out, atol=2e-6)
    np.testing.assert_allclose(shuffled[1], lse, atol=2e-6)


def test_blocks_beyond_the_longest_row_are_not_read():
    # A value that is read counts at least 0 * nan = nan.
    case = DecodeCase(lengths=(512, 30), slots=2000, **TINY)
    q, k, v, lengths = case.draw()
    out, _ = run(case, q, k, v.at[:, :, 512:].set(jnp.nan), lengths)
    np.testing.assert_array_equal(out, run(case, q, k, v, lengths)[0])


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_scores_of_any_size_neither_overflow_nor_vanish(size):
    case = AWKWARD["one slot past two blocks"]
    q, *rest = case.draw()
    arguments = (q * size, *rest)
    out, lse = run(case, *arguments)
    expected_out, expected_lse = case.expected(arguments)
    np.testing.assert_allclose(out, expected_out, atol=5e-4 if size > 1 else 2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


def test_as_many_programs_run_as_the_cores_hold_at_once():
    def splits(gpu, slots, **changed):
        sizes = {"batch": 1, "kv_heads": 4, "head_dim": 128, "dtype": jnp.bfloat16} | changed
        return choose_tiles(slots=slots, gpu=gpu, **sizes).num_splits

    assert splits(H200, 500_000) == 2 * 132 // 4
    assert splits(H200, 500_000, kv_heads=5) == 2 * 132 // 5  # one more would wait for the others
    assert splits(A100, 500_000) == 108 // 4  # less shared memory
    assert splits(H200, 500_000, batch=2) == 2 * 2 * 132 // 8  # one row may be much longer
    assert splits(H200, 500_000, batch=200) == 1
    assert splits(H200, 384) == 1  # a ring: nothing to merge
    assert splits(H200, 500_000, layout=INT4) == 12 * 132 // 4
