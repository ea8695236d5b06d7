"""Prefill attention through XLA: its blocks of queries, and that it agrees with decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention, prefill_attention
from kernels.prefill import triton, unpacked, xla
from kernels.prefill.cases import AWKWARD, PrefillCase
from kernels.tiles import AttentionTiles

TOLERANCE = {"atol": 2e-6, "rtol": 2e-5}


def run(case, *arguments):
    return jax.jit(functools.partial(case.run, implementation="xla"))(*arguments)


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut queries into the smallest blocks, so that there are many of them."""
    monkeypatch.setattr(xla, "_SCORE_BYTES", 1)  # seen by every call: `run` traces anew


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["odd length, group of 7", "one slot past two blocks"])
def test_blocks_of_queries_do_not_change_the_result(name):
    case = AWKWARD[name]
    arguments = case.draw()
    np.testing.assert_allclose(run(case, *arguments)[0], case.expected(arguments)[0], **TOLERANCE)


@pytest.mark.usefixtures("small_blocks")
def test_a_block_of_queries_reads_no_keys_beyond_its_diagonal():
    # A value that is read counts at least 0 * nan = nan.
    case = PrefillCase(
        length=600, slots=1025, starts=(0,), q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
    )
    q, k, v, starts = case.draw()
    out, _ = run(case, q, k, v.at[:, :, 512:].set(jnp.nan), starts)
    expected, _ = case.expected((q, k, v, starts))
    np.testing.assert_allclose(out[:, :512], expected[:, :512], **TOLERANCE)
    assert np.isnan(out[:, 512:]).all()


@pytest.mark.parametrize("bits", [None, 8])
def test_the_workspace_does_not_grow_with_the_pool_of_pages(bits):
    """A head is read from its rows' pages, not cut out of the pool first."""

    def workspace(others: int) -> int:
        case = PrefillCase(
            length=64, slots=2048, starts=(1900,), q_heads=4, kv_heads=2, head_dim=32,
            dtype="float32", page_size=64, bits=bits,
        )  # fmt: skip
        q, *pools, starts, pages = case.draw()
        k, v = (jax.tree.map(lambda x: jnp.concatenate([x, *[x] * others]), pool) for pool in pools)
        attend = functools.partial(xla.prefill_attention, softmax_scale=1.0)
        compiled = jax.jit(attend).lower(q, k, v, starts, pages).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert workspace(60) == workspace(0)


def test_each_query_gets_what_decode_gives_it():
    case = AWKWARD["29 tokens"]
    q, k, v, starts = case.draw()
    out, _ = run(case, q, k, v, starts)
    for t in (0, 1, 28):
        alone, _ = decode_attention(q[:, t], k, v, starts + t + 1, softmax_scale=case.softmax_scale)
        np.testing.assert_allclose(out[:, t], alone, atol=2e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize(
    ("starts", "slots", "shares"),
    [((0, 270), 320, 1), ((-5, 20), 320, 1), ((150,), 256, 1), ((-70, 800), 320, 3)],
)
def test_packed_keys_are_unpacked_in_blocks_and_merged(starts, slots, shares, page_size):
    """Rows that end in different blocks, a last block that is smaller, queries that see nothing."""
    case = PrefillCase(
        starts=starts, length=40, slots=slots, bits=8, q_heads=4, kv_heads=2, head_dim=16,
        dtype="float32", page_size=page_size, shares=shares,
    )  # fmt: skip
    q, k, v, first, *table = arguments = case.draw()
    attend = functools.partial(
        triton.prefill_attention,
        pages=None,
        shares=shares,
        softmax_scale=case.softmax_scale,
        tiles=AttentionTiles(block_q=16, block_kv=16, num_warps=4, num_stages=1),
        interpret=True,
    )
    pages = table[0] if table else None
    got = jax.jit(
        functools.partial(unpacked.prefill_attention, attend=attend, shares=shares, block=128)
    )(q, k, v, first, pages)  # fmt: skip
    for x, y in zip(got, case.expected(arguments), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=2e-5)


def in_three_blocks(*, start, length):
    """Return arguments of 192 packed slots, and what reads them 64 at a time."""
    case = PrefillCase(
        starts=(start,), length=length, slots=192, bits=8, q_heads=2, kv_heads=1, head_dim=16,
        dtype="float32",
    )  # fmt: skip
    attend = functools.partial(
        prefill_attention, softmax_scale=case.softmax_scale, implementation="xla"
    )
    return case.draw(), functools.partial(unpacked.prefill_attention, attend=attend, block=64)


def test_starts_of_few_bits_reach_all_blocks():
    """Start and length together are beyond the largest number of 8 bits."""
    (q, k, v, starts), run = in_three_blocks(start=120, length=20)
    for x, y in zip(
        run(q, k, v, starts.astype(jnp.int8), None), run(q, k, v, starts, None), strict=True
    ):
        np.testing.assert_array_equal(x, y)
