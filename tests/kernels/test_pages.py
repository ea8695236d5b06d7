"""Caches in pages: the same results as those of a cache whose slots lie together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention, pages, prefill_attention
from kernels.decode import cases as decode
from kernels.prefill import cases as prefill

CASES = {
    "decode, ragged": decode.AWKWARD["ragged rows in a full cache"],
    "decode, nothing filled": decode.AWKWARD["only empty rows"],
    "decode, bfloat16, head_dim 96": decode.CASES["head_dim 96"],
    **{f"decode, int{bits}": decode.PACKED[f"int{bits}, ragged rows"] for bits in (8, 4, 2)},
    "prefill, rows far apart": prefill.AWKWARD["rows far apart"],
    "prefill, odd length, group of 7": prefill.AWKWARD["odd length, group of 7"],
    **{f"prefill, int{bits}": prefill.PACKED[f"int{bits}, float32"] for bits in (8, 4, 2)},
}


def cases() -> list:
    """Return every case with every implementation.

    The kernels read a packed format with the same code for decoding and for prefill: by default
    each does so for one of them.
    """
    again = ("decode, int8", "prefill, int4", "prefill, int2")
    found = [pytest.param(name, "xla", id=f"{name}-xla") for name in CASES]
    for name in CASES:
        marks = [pytest.mark.slow] * (name in again)
        found.append(pytest.param(name, "interpret", id=f"{name}-interpret", marks=marks))
    return found


def in_pages(cache, table, page_size):
    """Cut rows into pages, and put them where the table says, among others that hold anything."""
    slots, number = cache.shape[2], int(table.max()) + 2

    def cut(leaf):
        batch, heads, length, width = leaf.shape
        size = page_size * length // slots
        padded = np.pad(np.asarray(leaf), ((0, 0), (0, 0), (0, -length % size), (0, 0)))
        pages = padded.reshape(batch, heads, -1, size, width).swapaxes(1, 2)
        pool = np.full((number, heads, size, width), 7, leaf.dtype)
        pool[table] = pages
        return jnp.asarray(pool)

    return jax.tree.map(cut, cache)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "implementation"), cases())
def test_where_pages_lie_does_not_matter(name, implementation):
    case, page_size = CASES[name], 128 if "far apart" in name else 64
    q, k, v, integers = case.draw()
    per_row = -(-case.slots // page_size)
    batch = len(integers)
    numbers = np.random.default_rng(0).permutation(batch * per_row + 3)[: batch * per_row]
    table = numbers.reshape(batch, per_row)
    op = decode_attention if name.startswith("decode") else prefill_attention
    op = functools.partial(op, softmax_scale=case.softmax_scale, implementation=implementation)
    run = jax.jit(op)
    wanted = run(q, k, v, integers)
    pools = (in_pages(x, table, page_size) for x in (k, v))
    got = run(q, *pools, integers, pages=jnp.asarray(table))
    tolerance = 2e-6 if case.dtype == "float32" else 1e-2
    for one, other in zip(got, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(other, np.float32),
            atol=tolerance,
            rtol=tolerance,
        )


def test_rows_may_share_pages():
    """Rows that begin alike read the same page, and what follows in pages of their own."""
    keys, values = jax.random.normal(jax.random.key(0), (2, 4, 2, 64, 16))
    q = jnp.tile(jax.random.normal(jax.random.key(1), (1, 4, 16)), (2, 1, 1))
    table = jnp.array([[3, 1], [3, 0]])
    run = functools.partial(decode_attention, q, keys, values, softmax_scale=0.25, pages=table)
    both, _ = run(jnp.array([64, 64]))
    np.testing.assert_array_equal(both[0], both[1])
    both, _ = run(jnp.array([70, 70]))
    assert np.abs(both[0] - both[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("size", "table", "reason"),
    [
        (48, jnp.zeros((1, 2), jnp.int32), "a page has 48 slots"),
        (32, jnp.zeros((1, 2), jnp.int32), "a page has 32 slots"),
        (64, jnp.zeros((2, 2), jnp.int32), "not integers for 1 rows"),
    ],
)
def test_pages_that_do_not_fit_are_refused(size, table, reason):
    pool = jnp.zeros((4, 2, size, 16))
    with pytest.raises(ValueError, match=reason):
        pages.check(pool, table, 1)
