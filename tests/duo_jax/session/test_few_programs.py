"""Texts of any lengths are read and continued by few programs; how much their caches round up."""

import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.cache import with_lengths
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.session import row_cache
from duo_jax.session.limits import Limits
from duo_jax.session.row_cache import chunk_width
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.params import random_params

pytestmark = pytest.mark.usefixtures("unhooked")

CONFIG = parse_config(models.llama(num_hidden_layers=1, max_position_embeddings=32_768))
HEADS = np.ones((1, CONFIG.num_kv_heads), bool)


@pytest.fixture(scope="module")
def runtime():
    params = split_params(CONFIG, random_params(CONFIG), HEADS)
    return Runtime(config=duo_config(CONFIG, HEADS, sink_size=1, recent_size=1), params=params)


@pytest.fixture
def programs(monkeypatch):
    """Read nothing, and record the shapes that every program would be compiled for."""
    seen = {"prefill": set(), "decode": set()}

    def prefill(_config, _params, cache, tokens, num_tokens, **_):
        slots = cache.layers[0].full[0].slots
        assert tokens.shape[1] <= slots
        seen["prefill"].add((tokens.shape, slots))
        seen["decode"].add((tokens.shape[0], slots))
        cache = with_lengths(cache, cache.lengths + num_tokens)
        return jnp.zeros((tokens.shape[0], CONFIG.vocab_size)), cache

    monkeypatch.setattr(row_cache, "_prefill", prefill)
    return seen


def cut(unread: int, *, chunk: int, mode: str = "exact") -> list[int]:
    """Return the widths in which a text is read."""
    widths = []
    while unread > 0:
        widths.append(chunk_width(unread, chunk, mode, more=bool(widths)))
        unread -= widths[-1]
    return widths


@pytest.mark.parametrize("max_new_tokens", [20, 256, 700])
@pytest.mark.parametrize("seed", range(3))
def test_twenty_prompts_of_random_lengths(runtime, programs, seed, max_new_tokens):
    rng = np.random.default_rng(seed)
    even, small = rng.integers(10, 4001, size=10), np.exp(rng.uniform(*np.log([10, 4000]), 10))
    for length in (*even.tolist(), *small.astype(int).tolist()):
        session = Session(runtime)
        session.append([[0] * length], room=max_new_tokens)
        assert session.capacity >= length + max_new_tokens
        assert session.cache.lengths.tolist() == [length]
    assert len(programs["decode"]) <= 4
    assert len(programs["prefill"]) <= 6


def test_no_length_from_10_to_4000_needs_a_seventh_program():
    limits = Limits(architecture=CONFIG, max_len=None)
    pairs = set()
    for length in range(10, 4001):
        for room in (1, 256, 700):
            slots = limits.capacity(length + room)
            pairs |= {(width, slots) for width in cut(length, chunk=8192)}
    assert len(pairs) == 6


def test_a_cache_is_at_most_twice_as_long_as_its_text_and_an_eighth_if_that_is_long():
    limits = Limits(architecture=CONFIG, max_len=None)
    for size in range(1, CONFIG.max_positions + 1, 7):
        slots = limits.capacity(size)
        assert size <= slots <= (max(1024, 2 * size) if size <= 8192 else 1.125 * size)


@pytest.mark.parametrize(("batch_size", "slots"), [(1, 1024), (2, 512), (3, 256), (64, 256)])
def test_many_short_rows_do_not_take_the_memory_of_long_ones(batch_size, slots):
    assert Limits(architecture=CONFIG, max_len=None, batch_size=batch_size).capacity(9) == slots


def test_a_given_length_is_taken_as_it_is():
    assert Limits(architecture=CONFIG, max_len=77).capacity(9) == 77


@pytest.mark.parametrize(
    ("unread", "mode", "widths"),
    [
        (1, "exact", [1]),
        (1025, "exact", [1024, 1024]),
        (2, "exact", [64]),
        (65, "exact", [256]),
        (1030, "exact", [1024, 1024]),
        (2047, "exact", [1024, 1024]),
        (2048, "exact", [2048]),
        (4100, "exact", [2048, 2048, 1024]),
        (1030, "chunk", [2048]),
        (4100, "chunk", [2048, 2048, 1024]),
    ],
)
def test_how_a_text_is_cut(unread, mode, widths):
    assert cut(unread, chunk=2048, mode=mode) == widths
