"""Hard concrete masks: how often they are 0, what lies between, and the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import hard_concrete

LOG_ALPHA = jnp.array([[-4.0, -1.6], [0.0, 4.5]])


def draw(log_alpha, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(hard_concrete.sample, in_axes=(0, None)))(keys, log_alpha))


def test_masks_are_zero_as_often_as_told_and_one_as_often_by_symmetry():
    masks = draw(LOG_ALPHA)
    assert masks.min() == 0.0
    assert masks.max() == 1.0
    expected = hard_concrete.probability_of_zero(LOG_ALPHA)
    np.testing.assert_allclose((masks == 0).mean(axis=0), expected, atol=0.03)
    mirrored = hard_concrete.probability_of_zero(-LOG_ALPHA)
    np.testing.assert_allclose((masks == 1).mean(axis=0), mirrored, atol=0.03)
    assert 0.002 < expected[1, 1] < 0.003  # the start: sigmoid(-1.599 - 4.5)


def test_what_lies_between_is_the_stretched_sigmoid():
    """At the median of u, log u - log(1 - u) is 0."""
    medians = np.median(draw(LOG_ALPHA, 20_001), axis=0)
    sigmoid = 1 / (1 + np.exp(-np.asarray(LOG_ALPHA) * 3 / 2))
    np.testing.assert_allclose(medians, np.clip(1.2 * sigmoid - 0.1, 0, 1), atol=0.02)


def test_the_key_decides():
    first, second = (hard_concrete.sample(jax.random.key(k), LOG_ALPHA) for k in (1, 2))
    assert (first != second).any()
    np.testing.assert_array_equal(first, hard_concrete.sample(jax.random.key(1), LOG_ALPHA))


@pytest.mark.parametrize("function", [hard_concrete.sample, hard_concrete.probability_of_zero])
def test_gradient_equals_central_differences_in_float64(function):
    with jax.enable_x64(True):
        if function is hard_concrete.sample:
            function = functools.partial(function, jax.random.key(3))
        at = jnp.zeros((3, 3), jnp.float64)
        gradient = jax.grad(lambda x: jnp.sum(function(x)))(at)
        difference = (function(at + 1e-6) - function(at - 1e-6)) / 2e-6
    assert (np.abs(gradient) > 0.01).sum() >= 3
    np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-9)
