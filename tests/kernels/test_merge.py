"""Attention over parts of the keys merges to attention over all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention, dense
from kernels import merge_lse as any_merge
from kernels.gpu import A100
from kernels.merge.heuristic import choose_tiles
from kernels.tiles import MergeTiles


@pytest.fixture(params=["xla", "interpret"])
def merge_lse(request):
    return jax.jit(functools.partial(any_merge, implementation=request.param))


def attend(scores, values):
    """Return softmax attention and its lse in float64; scores [rows, keys], values [keys, h]."""
    if not scores.shape[1]:
        return np.zeros((len(scores), values.shape[1])), np.full(len(scores), -np.inf)
    weights, lse = dense.softmax(scores)
    return weights @ values, lse


def draw(keys: int, rows: int = 5, head_dim: int = 8):
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((rows, keys)), rng.standard_normal((keys, head_dim))


def parts_of(scores, values, edges):
    parts = [
        attend(scores[:, start:end], values[start:end]) for start, end in itertools.pairwise(edges)
    ]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    return jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "edges",
    [(0, 97), (0, 1, 97), (0, 96, 97), (0, 40, 41, 97), (0, 0, 50, 50, 97, 97), tuple(range(98))],
    ids=["one part", "first alone", "last alone", "three", "empty parts", "one key each"],
)
def test_any_split_merges_to_the_whole(merge_lse, edges):
    scores, values = draw(97)
    out, lse = merge_lse(*parts_of(scores, values, edges))
    want_out, want_lse = attend(scores, values)
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_parts_that_saw_nothing_count_nothing_whatever_they_hold(merge_lse):
    outs, lses = parts_of(*draw(20), (0, 7, 20))
    want_out, want_lse = merge_lse(outs, lses)
    garbage = jnp.full_like(outs[:1], 1e9)
    nothing = jnp.full_like(lses[:1], -jnp.inf)
    out, lse = merge_lse(jnp.concatenate([garbage, outs]), jnp.concatenate([nothing, lses]))
    np.testing.assert_allclose(out, want_out, atol=1e-6)
    np.testing.assert_array_equal(lse, want_lse)


def test_rows_that_no_part_saw_are_zero_and_minus_infinity(merge_lse):
    outs, lses = parts_of(*draw(20), (0, 7, 20))
    out, lse = merge_lse(outs.at[:, 2].set(0), lses.at[:, 2].set(-jnp.inf))
    assert not out[2].any()
    assert lse[2] == -jnp.inf
    assert np.isfinite(np.delete(lse, 2)).all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_scores_of_any_size_neither_overflow_nor_vanish(merge_lse, shift):
    outs, lses = parts_of(*draw(20), (0, 7, 20))
    want, want_lse = merge_lse(outs, lses)
    out, lse = merge_lse(outs, lses + shift)
    np.testing.assert_allclose(out, want, atol=2e-3)  # lse near 1e4 has steps of 1e-3
    np.testing.assert_allclose(lse, want_lse + shift, atol=2e-3)


def test_merging_is_associative_and_its_order_does_not_matter(merge_lse):
    outs, lses = parts_of(*draw(97), (0, 10, 40, 97))
    want = merge_lse(outs, lses)
    (out, lse) = merge_lse(outs[:2], lses[:2])
    nested = merge_lse(jnp.stack([out, outs[2]]), jnp.stack([lse, lses[2]]))
    reverse = merge_lse(outs[::-1], lses[::-1])
    for got in (nested, reverse):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(merge_lse, dtype):
    outs, lses = parts_of(*draw(97), (0, 10, 40, 97))
    out, lse = merge_lse(outs.astype(dtype), lses)
    want, want_lse = merge_lse(outs.astype(dtype).astype(jnp.float32), lses)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(out, want.astype(dtype))
    np.testing.assert_array_equal(lse, want_lse)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rows", [(), (3,), (2, 3, 4)], ids=str)
def test_rows_may_have_any_axes(merge_lse, rows):
    rng = np.random.default_rng(0)
    outs = jnp.asarray(rng.standard_normal((2, *rows, 8)), jnp.float32)
    lses = jnp.asarray(rng.standard_normal((2, *rows)), jnp.float32)
    out, lse = merge_lse(outs, lses)
    assert (out.shape, lse.shape) == ((*rows, 8), rows)
    flat, _ = merge_lse(outs.reshape(2, -1, 8), lses.reshape(2, -1))
    np.testing.assert_allclose(out, flat.reshape(out.shape), atol=1e-6)


@pytest.mark.slow
def test_a_ring_and_a_cache_merge_to_attention_over_both(merge_lse):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 4, 16)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 2, 50, 16)), jnp.float32)

    def part(start, end, implementation):
        lengths = jnp.full(2, end - start, jnp.int32)
        kv = k[:, :, start:end], v[:, :, start:end]
        return decode_attention(q, *kv, lengths, softmax_scale=0.25, implementation=implementation)

    parts = [part(0, 20, "interpret"), part(20, 50, "xla")]
    out, lse = merge_lse(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    want_out, want_lse = part(0, 50, "xla")
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_numbers_that_are_none_stay_none(merge_lse):
    outs, lses = parts_of(*draw(20), (0, 7, 20))
    for part in range(2):
        out, lse = merge_lse(outs, lses.at[part, 2].set(jnp.nan))
        assert np.isnan(out[2]).all()
        assert np.isnan(lse[2])
        assert np.isfinite(np.delete(out, 2, axis=0)).all()
        assert np.isfinite(np.delete(lse, 2)).all()
        # Beside a part that saw nothing too.
        _, lse = merge_lse(outs, lses.at[part, 2].set(jnp.nan).at[1 - part, 2].set(-jnp.inf))
        assert np.isnan(lse[2])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("block_parts", [1, 2, 4])
def test_any_tiles_give_the_same(block_parts):
    rng = np.random.default_rng(0)
    outs = jnp.asarray(rng.standard_normal((3, 7, 5, 24)), jnp.float32)
    lses = jnp.asarray(rng.standard_normal((3, 7, 5)), jnp.float32)
    tiles = MergeTiles(block_parts=block_parts, block_columns=16, num_warps=4, num_stages=1)
    got = any_merge(outs, lses, implementation="interpret", tiles=tiles)
    for x, y in zip(got, any_merge(outs, lses), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_few_rows_are_shared_by_programs_and_many_parts_read_in_turn():
    of = functools.partial(choose_tiles, head_dim=128, gpu=A100)
    few, many = of(parts=396, rows=16), of(parts=2, rows=1_000_000)
    assert (few.block_parts, few.block_columns) == (128, 32)
    assert (many.block_parts, many.block_columns) == (2, 128)


REFUSED = {
    "other rows": ((jnp.ones((2, 3, 8)), jnp.ones((2, 4))), "do not fit"),
    "no parts": ((jnp.ones((0, 3, 8)), jnp.ones((0, 3))), "are empty"),
}


@pytest.mark.parametrize(("arrays", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_parts_that_do_not_fit_are_refused(arrays, message):
    with pytest.raises(Exception, match=rf"{message}|Type-check"):  # the type checker may be first
        any_merge(*arrays)


def test_what_the_kernel_cannot_take_is_refused():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 2**23, 128), (2, 2**23))]
    with pytest.raises(NotImplementedError, match="2,147,483,648 elements"):
        jax.eval_shape(functools.partial(any_merge, implementation="interpret"), *shapes)
    jax.eval_shape(any_merge, *shapes)


def test_a_tile_of_many_parts_and_rows_stays_small():
    tiles = choose_tiles(parts=99, rows=256, head_dim=128, gpu=A100)
    assert (tiles.block_parts, tiles.block_columns) == (32, 128)
