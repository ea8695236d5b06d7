"""The divergence of answers: zero where all gates are 1, else what the logits say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import models
from tests.params import random_params
from train import gates as gated
from train.answers import answer_divergence
from train.distillation import Batch

SIZES = {"sink_size": 3, "recent_size": 9}
GATES = jnp.array([[0.1, 0.8], [0.4, 0.0]])


@functools.cache
def model():
    config = parse_config(models.CASES["llama-3, grouped queries"])
    return config, random_params(config)


def batch() -> Batch:
    """Return two texts: the second is shorter, and its answer ends where it ends."""
    rng = np.random.default_rng(4)
    answers = np.zeros((2, 64), bool)
    answers[0, [45, 46, 55]] = answers[1, [47, 48, 49]] = True
    return Batch(
        tokens=jnp.asarray(rng.integers(0, 96, (2, 64), np.int32)),
        tail_start=jnp.array([42, 40]),
        total_length=jnp.array([60, 50]),
        answers=jnp.asarray(answers),
    )


@functools.partial(jax.jit, static_argnames=("mixing", "tail_size"))
def _divergence(gates, params, data, mixing, tail_size):
    config, _ = model()
    return answer_divergence(
        gates, config, params, data, mixing=mixing, tail_size=tail_size, **SIZES
    )


_and_gradient = jax.jit(jax.value_and_grad(_divergence), static_argnums=(3, 4))


def divergence_and_gradient(gates, data):
    """Return both of one program: of the value alone there would be another to compile."""
    return _and_gradient(gates, model()[1], data, "self", 24)


def divergence(gates, data, *, mixing="self", tail_size=24):
    if (mixing, tail_size) == ("self", 24):
        return divergence_and_gradient(gates, data)[0]
    return _divergence(gates, model()[1], data, mixing, tail_size)


@jax.jit
def log_p(params, gates, tokens):
    """Return log-probabilities of the next tokens, with both terms from the model's own keys."""
    config, _ = model()
    attend = gated.self_mixed_attention(**SIZES)
    x, _ = llama.hidden_states(config, params, tokens, attend=attend, layer_inputs=gates)
    return jax.nn.log_softmax(llama.logits(config, params, x))


@pytest.mark.slow
@pytest.mark.parametrize("tail_size", [24, 64])
def test_it_is_the_mean_divergence_where_answers_are_predicted(tail_size):
    data = batch()
    full, mixed = (
        np.asarray(log_p(model()[1], gates, data.tokens), np.float64)
        for gates in (jnp.ones((2, 2)), GATES)
    )
    expected = np.mean(
        [
            np.sum(np.exp(full[row, at - 1]) * (full[row, at - 1] - mixed[row, at - 1]))
            for row, at in zip(*np.nonzero(data.answers), strict=True)
        ]
    )
    assert expected > 1e-3
    np.testing.assert_allclose(divergence(GATES, data, tail_size=tail_size), expected, rtol=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_full_attention_diverges_in_nothing(mixing):
    np.testing.assert_allclose(divergence(jnp.ones((2, 2)), batch(), mixing=mixing), 0, atol=1e-6)


@pytest.mark.slow
def test_gradient_is_that_of_finite_differences():
    _, gradient = divergence_and_gradient(GATES, batch())
    for index in [(0, 1), (1, 0)]:
        nudge = jnp.zeros((2, 2)).at[index].set(1e-2)
        above, below = (divergence(GATES + sign * nudge, batch()) for sign in (1, -1))
        difference = (above - below) / 2e-2
        np.testing.assert_allclose(gradient[index], difference, rtol=2e-2)
