"""Scores of given tokens, against numpy on whole logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.model import llama, token_scores
from duo_jax.model.hf_config import parse_config
from duo_jax.model.token_scores import check_finite, score_logits, score_streams
from tests import models
from tests.params import random_params

ARCHITECTURE = parse_config(models.llama(num_hidden_layers=1))


def expected(logits, tokens, reference):
    log_p, log_r = (
        x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
        for x in np.asarray([logits, reference], np.float64)
    )
    nll = -np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return nll, (np.exp(log_r) * (log_r - log_p)).sum(axis=-1)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("length", [1, 4, 11])
def test_streams_are_scored_by_their_logits(monkeypatch, length):
    monkeypatch.setattr(token_scores, "_PLACES", 4)
    score_streams.clear_cache()
    rng, params = np.random.default_rng(0), random_params(ARCHITECTURE)
    shape = (2, length, ARCHITECTURE.embed_size)
    x, reference = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    tokens = rng.integers(ARCHITECTURE.vocab_size, size=shape[:2]).astype(np.int32)
    found = score_streams(ARCHITECTURE, params, x, jnp.asarray(tokens), reference)
    logits, others = (np.asarray(llama.logits(ARCHITECTURE, params, s)) for s in (x, reference))
    nll, kl = expected(logits, tokens, others)
    np.testing.assert_array_equal(found.predicted, logits.argmax(axis=-1))
    np.testing.assert_allclose(found.nll, nll, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, atol=1e-5)
    assert kl.min() > 0.01
    score_streams.clear_cache()


def test_no_place_is_no_score():
    x = jnp.zeros((2, 0, ARCHITECTURE.embed_size))
    tokens = jnp.zeros((2, 0), jnp.int32)
    found = score_streams(ARCHITECTURE, random_params(ARCHITECTURE), x, tokens)
    assert found.nll.shape == (2, 0)
    assert found.kl is None


def test_a_model_does_not_diverge_from_itself():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 30)), jnp.float32)
    tokens = jnp.arange(5)
    assert not score_logits(logits, tokens, logits).kl.any()
    assert score_logits(logits, tokens).kl is None


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match=r"not finite.*--dtype float32"):
        check_finite(np.array([1.0, np.nan]))
