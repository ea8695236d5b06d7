"""The language-modelling loss: the plain model's where all gates are 1, and its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import models
from tests.params import random_params
from train.distillation import Batch
from train.language_modelling import language_modelling_loss

SIZES = {"sink_size": 3, "recent_size": 9}


@functools.cache
def model():
    config = parse_config(models.CASES["llama-3, grouped queries"])
    return config, random_params(config)


def batch(*totals: int, length: int = 640) -> Batch:
    tokens = np.random.default_rng(1).integers(0, 96, (len(totals), length), np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.zeros(len(totals), jnp.int32),
        total_length=jnp.array(totals),
    )


@functools.partial(jax.jit, static_argnames="mixing")
def _loss(gates, params, data, mixing):
    return language_modelling_loss(gates, model()[0], params, data, mixing=mixing, **SIZES)


def loss(gates, data, *, mixing="teacher", params=None):
    return _loss(gates, params or model()[1], data, mixing)


@jax.jit
def _logits(params, tokens):
    config, _ = model()
    return llama.logits(config, params, llama.hidden_states(config, params, tokens)[0])


def by_hand(data: Batch) -> float:
    """Look every token's probability up, one by one, with full attention."""
    _, params = model()
    rows = [_logits(params, tokens[None]) for tokens in data.tokens]  # one program for all
    logits = np.concatenate(rows).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = [
        -log_p[row, position - 1, data.tokens[row, position]]
        for row, total in enumerate(data.total_length)
        for position in range(1, int(total))
        if data.answers is None or data.answers[row, position]
    ]
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixing", "data"),
    [
        ("teacher", batch(640, 410)),
        ("self", batch(64, 41, length=64)),
    ],
    ids=["teacher, blocks, whole and padded", "self, whole and padded"],
)
def test_all_gates_one_is_the_cross_entropy_of_the_model(mixing, data):
    """Of both mixings: test_of_answers_only_their_tokens_count has "self"."""
    np.testing.assert_allclose(loss(jnp.ones((2, 2)), data, mixing=mixing), by_hand(data), 1e-5)


@pytest.mark.slow
def test_of_answers_only_their_tokens_count():
    """In the second of two blocks, so that the first has nothing to predict."""
    answers = np.zeros((1, 640), bool)
    answers[0, [530, 531, 590, 639]] = True  # the last one is beyond the text
    data = dataclasses.replace(batch(600), answers=jnp.asarray(answers))
    np.testing.assert_allclose(loss(jnp.ones((2, 2)), data, mixing="self"), by_hand(data), 1e-5)


@pytest.mark.slow
def test_padding_and_the_start_of_the_tail_do_not_count():
    gates, data = jnp.full((2, 2), 0.4), batch(60, 70)
    expected = loss(gates, data)
    padded = Batch(
        tokens=data.tokens.at[0, 60:].set(5).at[1, 70:].set(5),
        tail_start=jnp.array([17, 3]),
        total_length=data.total_length,
    )
    np.testing.assert_array_equal(loss(gates, padded), expected)
    last = Batch(
        tokens=data.tokens.at[0, 59].set((data.tokens[0, 59] + 1) % 96),
        tail_start=data.tail_start,
        total_length=data.total_length,
    )
    assert loss(gates, last) != expected


@pytest.mark.slow
@pytest.mark.usefixtures("unhooked")  # the other tests check the hints
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_gradient_equals_central_differences_in_float64(mixing):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), model()[1])
        gates = jnp.array([[0.3, 0.8], [0.6, 0.5]], jnp.float64)
        data = batch(60, length=64)
        value = functools.partial(loss, data=data, mixing=mixing, params=params)
        both = jax.jit(jax.value_and_grad(value))
        _, gradient = both(gates)
        for index in np.ndindex(2, 2):
            nudge = jnp.zeros((2, 2), jnp.float64).at[index].set(1e-5)
            difference = (both(gates + nudge)[0] - both(gates - nudge)[0]) / 2e-5
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-5)
    assert np.abs(gradient).min() > 0
