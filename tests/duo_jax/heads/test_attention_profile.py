"""The attention profile: against numpy by hand, its bounds, and what it never computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.data.passkeys import Sample
from duo_jax.heads import attention_profile as profiling
from duo_jax.heads.attention_profile import attention_profile, kv_scores, sample_profile
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from tests import models
from tests.params import random_params

SIZES = {"sink_size": 3, "recent_size": 9}


@functools.cache
def model():
    config = parse_config(models.CASES["llama-3, grouped queries"])
    # Sharp attention: with random weights as they are, every head looks everywhere alike.
    params = random_params(config)
    attention = params["layers"]["self_attn"]
    sharp = {"q_proj": {"kernel": attention["q_proj"]["kernel"] * 6}}
    return config, params | {"layers": params["layers"] | {"self_attn": attention | sharp}}


def sample(seed: int = 0, *, length: int = 60, answers=((40, 44), (50, 53))) -> Sample:
    tokens = np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)
    return Sample(tokens=tokens, tail_start=38, answers=answers, depths=(0.5, 0.2))


@jax.jit
def _noted(params, tokens):
    def attend(q, k, v, _):
        return llama.attend_full(q, k, v, None)[0], (q, k)

    return llama.hidden_states(model()[0], params, tokens, attend=attend)[1]


def queries_and_keys(tokens: np.ndarray) -> list[np.ndarray]:
    """Return those of up to 128 tokens in every layer, in float64."""
    padded = np.pad(tokens, (0, 128 - tokens.size))  # what follows changes nothing before it
    return [np.asarray(x, np.float64)[:, 0] for x in _noted(model()[1], jnp.asarray(padded[None]))]


def by_hand(texts, *, sink_size: int, recent_size: int) -> np.ndarray:
    """In float64, position by position, from the queries and keys of the model itself."""
    config, _ = model()
    profiles = []
    for text in texts:
        q, k = queries_and_keys(text.tokens)
        positions = [i for start, stop in text.answers for i in range(start - 1, stop - 1)]
        profile = np.zeros((config.num_layers, config.num_q_heads))
        for layer, head in np.ndindex(profile.shape):
            for t in positions:
                keys = k[layer, : t + 1, head // config.q_per_kv]
                scores = np.exp(keys @ q[layer, t, head] * config.head_dim**-0.5)
                far = scores[sink_size : max(sink_size, t + 1 - recent_size)].sum()
                profile[layer, head] += far / scores.sum() / len(positions)
        profiles.append(profile)
    mean = np.mean(profiles, axis=0)
    return mean.reshape(config.num_layers, config.num_kv_heads, -1).max(axis=-1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("sizes", [SIZES, {"sink_size": 0, "recent_size": 1}], ids=str)
def test_score_is_the_attention_beyond_sinks_and_recents_at_the_answers(sizes):
    texts = [sample(0), sample(1, length=48, answers=((39, 47),)), sample(2)]
    scores = attention_profile(*model(), texts, **sizes)
    np.testing.assert_allclose(scores, by_hand(texts, **sizes), rtol=1e-4)
    assert scores.max() - scores.min() > 0.01


def test_more_answers_than_a_block_of_queries():
    text = sample(length=128, answers=((20, 60), (70, 125)))
    np.testing.assert_allclose(
        attention_profile(*model(), [text], **SIZES), by_hand([text], **SIZES), rtol=1e-4
    )


def test_a_window_over_everything_leaves_nothing_far_away():
    scores = attention_profile(*model(), [sample()], sink_size=0, recent_size=60)
    np.testing.assert_array_equal(scores, 0.0)


def test_padding_changes_nothing():
    config, params = model()
    exact = sample_profile(config, params, sample(), length=60, **SIZES)
    padded = sample_profile(config, params, sample(), length=96, **SIZES)
    np.testing.assert_allclose(padded, exact, rtol=1e-5)


def test_one_query_head_that_retrieves_makes_a_retrieval_head():
    config, _ = model()
    profile = np.array([[0.9, 0.0, 0.1, 0.2], [0.0, 0.3, 1.0 + 1e-6, 0.0]])
    np.testing.assert_array_equal(kv_scores(config, profile), [[0.9, 0.2], [0.3, 1.0]])


def test_nothing_is_quadratic_in_the_length():
    """At 2,048 tokens, queries go 64 at a time; the model's own attention is not looked at."""
    config, _ = model()
    length = 2048
    q = jnp.zeros((length, config.num_q_heads, config.head_dim))
    k = jnp.zeros((length, config.num_kv_heads, config.head_dim))
    function = functools.partial(profiling._sum_over_positions, **SIZES)
    jaxpr = jax.make_jaxpr(function)(q, k, jnp.arange(length))
    largest = max(int(np.prod(shape)) for shape in _shapes(jaxpr.jaxpr))
    assert largest == config.num_q_heads * 64 * length


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_samples_of_one_kind_share_a_compilation():
    config, params = model()
    profiling._far_attention.clear_cache()
    for answers in (((40, 44), (50, 53)), ((41, 47),)):
        text = dataclasses.replace(sample(), answers=answers)
        sample_profile(config, params, text, length=60, **SIZES)
    assert profiling._far_attention._cache_size() == 1
