"""The reconstruction score: against numpy by hand, and what does not change it."""

import dataclasses
import functools

import numpy as np
import pytest

from duo_jax.heads.reconstruction import Instruction, _chunk_size, head_scores, key_scores
from duo_jax.heads.split import split_params
from tests import models
from tests.duo_jax.heads.test_attention_profile import model, queries_and_keys

WHOLE = 10 * (5, 6, 7)  # so long that the repetition takes two blocks of queries
INSTRUCTION = Instruction(whole=WHOLE, part=(8, 9), begin=(10,))
LENGTHS = np.array([40, 27], np.int32)


def texts() -> np.ndarray:
    tokens = models.tokens(models.llama(), batch=2, length=40)
    return np.where(np.arange(40) < LENGTHS[:, None], tokens, 0)


@functools.cache
def scores(**options):
    config, params = model()
    return key_scores(config, params, texts(), LENGTHS, instruction=INSTRUCTION, **options)


def by_hand(row: int, *, chunk: int, sink_size: int = 0, recent_size: int = 0) -> np.ndarray:
    """In float64, query by query; each chunk's repetition behind the whole text by one forward."""
    config, _ = model()
    length = int(LENGTHS[row])
    text = texts()[row, :length]
    found = np.zeros((config.num_layers, config.num_kv_heads, 40))
    for start in range(0, length, chunk):
        told = [8, 9, *text[start - 8 : start]] if start else WHOLE
        tokens = np.array([*text, *told, 10, *text[start : start + chunk]], np.int32)
        q, k = queries_and_keys(tokens)
        stop = min(start + chunk, length)
        for layer, head, t in np.ndindex(config.num_layers, config.num_q_heads, tokens.size):
            if t < length:
                continue
            seen = np.array([*range(min(4, start)), *range(start, stop), *range(length, t + 1)])
            own = head // config.q_per_kv
            paid = np.exp(k[layer, seen, own] @ q[layer, t, head] * config.head_dim**-0.5)
            for j, share in zip(seen, paid / paid.sum(), strict=True):
                if start <= j < stop and j >= sink_size and t - j >= recent_size:
                    found[layer, own, j] = max(found[layer, own, j], share)
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options",
    [{"chunk": 40}, {"chunk": 16, "sink_size": 3, "recent_size": 20}],
    ids=str,
)
def test_score_is_the_largest_attention_that_the_repetition_pays(options):
    found = scores(**options)
    for row in range(2):
        np.testing.assert_allclose(found[:, row], by_hand(row, **options), rtol=2e-4, atol=1e-7)
    assert found.max() - found.min() > 0.1


def test_a_head_has_the_score_of_its_best_key():
    found = scores(chunk=40)
    np.testing.assert_array_equal(head_scores(found[:, 0]), found[:, 0].max(axis=-1))
    assert head_scores(np.array([[[0.2, 1.0 + 1e-6]]])) == 1.0


def test_serving_form_has_the_same_scores():
    config, params = model()
    heads = np.ones((config.num_layers, config.num_kv_heads), bool)
    served = split_params(config, params, heads)
    found = key_scores(config, served, texts(), LENGTHS, instruction=INSTRUCTION, chunk=40)
    np.testing.assert_allclose(found, scores(chunk=40), rtol=1e-5)


def test_chunks_are_shorter_where_the_range_ends():
    """The tiny model reads 128 tokens; an instruction takes up to 31, chunks are in steps of 64."""
    config, _ = model()
    assert _chunk_size(config, 40, INSTRUCTION) == 40
    assert _chunk_size(config, 100, INSTRUCTION) == 64  # beyond the range, as nothing is left
    longer = dataclasses.replace(config, max_positions=10_000)
    assert _chunk_size(longer, 9_800, INSTRUCTION) == 128
    assert _chunk_size(longer, 5_000, INSTRUCTION) == 2_048
