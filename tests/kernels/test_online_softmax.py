"""Softmax block by block: however keys are cut and ordered, the result is that of all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dense, online_softmax

BATCH, KV_HEADS, ROWS, KEYS, HEAD_DIM = 2, 2, 5, 60, 8
SCALE = HEAD_DIM**-0.5


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, KV_HEADS, n, HEAD_DIM) for n in (ROWS, KEYS, KEYS)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    mask = rng.random((BATCH, KV_HEADS, ROWS, KEYS)) < 0.4
    mask[0, 0, 1] = False  # sees nothing
    mask[:, :, 2, :50] = False  # sees nothing at first
    mask[:, :, 3, 10:] = False  # sees nothing later
    return q, k, v, jnp.asarray(mask)


def at_once(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.where(mask, SCALE * np.einsum("bkrh,bksh->bkrs", q, k), -np.inf)
    weights, lse = dense.softmax(scores)
    return np.einsum("bkrs,bksh->bkrh", weights, v), lse


add_block = jax.jit(online_softmax.add_block, static_argnames="softmax_scale")


def in_blocks(q, k, v, mask, blocks):
    state = online_softmax.start(q)
    for keys in blocks:
        state = add_block(
            state, q, k[:, :, keys], v[:, :, keys], mask[..., keys], softmax_scale=SCALE
        )
    return online_softmax.finish(state)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cuts", [[], [1], [30], [59], [10, 20, 30, 40, 50], [3, 4, 33]])
def test_any_cut_in_any_order_equals_all_at_once(cuts):
    blocks = np.split(np.arange(KEYS), cuts)
    q, k, v, mask = draw()
    expected_out, expected_lse = at_once(q, k, v, mask)
    for order in (blocks, blocks[::-1]):
        out, lse = in_blocks(q, k, v, mask, order)
        np.testing.assert_allclose(out, expected_out, atol=2e-6)
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_a_row_that_sees_nothing_gets_zeros_and_minus_infinity():
    out, lse = in_blocks(*draw(), np.split(np.arange(KEYS), 3))
    assert not out[0, 0, 1].any()
    assert lse[0, 0, 1] == -np.inf
    assert np.isfinite(np.delete(np.asarray(lse).reshape(-1), 1)).all()
    # Nor does it see anything where no block has come yet.
    out, lse = online_softmax.finish(online_softmax.start(draw()[0]))
    assert not out.any()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    q, k, v, mask = draw(dtype)
    blocks = np.split(np.arange(KEYS), 12)
    out, lse = in_blocks(q, k, v, mask, blocks)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    expected_out, expected_lse = at_once(q, k, v, mask)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    # Only the weights are rounded, once each: no error grows with the number of blocks.
    np.testing.assert_allclose(out, expected_out, atol=2 * float(jnp.finfo(dtype).eps))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        q, k, v, mask = draw(np.float64)
        out, lse = in_blocks(q, k, v, mask, np.split(np.arange(KEYS), 4))
        assert (out.dtype, lse.dtype) == (jnp.float64, jnp.float64)
    expected_out, expected_lse = at_once(q, k, v, mask)
    np.testing.assert_allclose(out, expected_out, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-14)
