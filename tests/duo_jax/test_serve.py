"""Properties of a split model with two caches, on tiny random models in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import llama, serve
from duo_jax.cache import init_cache
from duo_jax.config import parse_config
from duo_jax.split import duo_config, split_params
from kernels import masks
from tests import models

SINK, RECENT = 4, 6
LENGTH = 37  # the ring wraps several times
RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=3)
CONFIG = parse_config(RAW)
# Layers with some, no and only retrieval heads, and none of them in order.
MIXED = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
ALL, NONE = np.ones((3, 4), bool), np.zeros((3, 4), bool)
HEADS = {"mixed": MIXED, "all retrieval": ALL, "all streaming": NONE}


@functools.cache
def params():
    return llama.init_params(CONFIG, jax.random.key(0))


def split(heads, *, config=CONFIG, weights=None, sink=SINK, recent=RECENT):
    weights = params() if weights is None else weights
    return (
        duo_config(config, heads, sink_size=sink, recent_size=recent),
        split_params(config, weights, heads),
    )


def masked_logits(
    heads, tokens, *, config=CONFIG, weights=None, sink=SINK, recent=RECENT, **settings
):
    """Run the unsplit model at once, every head at full length behind its mask."""
    kv_heads = jnp.asarray(heads)

    def attend(q, k, v, is_retrieval):
        positions = jnp.arange(q.shape[1])
        causal = masks.causal(positions, positions)
        window = masks.streaming(positions, positions, sink_size=sink, recent_size=recent)
        mask = jnp.where(is_retrieval[:, None, None], causal[None], window[None])
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(mask[None, :, None], scores, -jnp.inf)
        out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
        return out.reshape(*out.shape[:2], -1, out.shape[-1]), None

    weights = params() if weights is None else weights
    x, _ = llama.hidden_states(
        config, weights, tokens, attend=attend, layer_inputs=kv_heads, **settings
    )
    return llama.logits(config, weights, x)


def tokens_of(batch=2, length=LENGTH, seed=0):
    return jnp.asarray(models.tokens(RAW, batch=batch, length=length, seed=seed))


prefill = jax.jit(serve.prefill, static_argnums=0, static_argnames="mode", donate_argnums=2)
decode = jax.jit(serve.decode, static_argnums=0, donate_argnums=2)


def read(config, weights, tokens, *, chunk, mode="exact", max_len=LENGTH + 3):
    """Prefill in chunks; return the logits after every chunk and the cache."""
    cache = init_cache(config, batch_size=tokens.shape[0], max_len=max_len)
    ends, seen = [], []
    for first in range(0, tokens.shape[1], chunk):
        part = tokens[:, first : first + chunk]
        num = jnp.full(tokens.shape[0], part.shape[1])
        part = jnp.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        logits, cache = prefill(config, weights, cache, part, num, mode=mode)
        ends.append(first + int(num[0]) - 1)
        seen.append(logits)
    return np.array(ends), jnp.stack(seen, axis=1), cache


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("chunk", [1, 7, SINK, SINK + RECENT + 1, LENGTH, 2 * LENGTH])
def test_prefill_in_chunks_equals_one_masked_forward(heads, chunk):
    config, weights = split(heads)
    tokens = tokens_of()
    ends, logits, cache = read(config, weights, tokens, chunk=chunk)
    expected = masked_logits(heads, tokens)
    np.testing.assert_allclose(logits, expected[:, ends], atol=2e-5)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("prompt", [1, 3, SINK + RECENT - 1, SINK + RECENT, 20])
def test_prefill_then_decode_equals_one_forward_at_every_position(heads, prompt):
    config, weights = split(heads)
    tokens = tokens_of()
    expected = masked_logits(heads, tokens)
    _, _, cache = read(config, weights, tokens[:, :prompt], chunk=prompt)
    for position in range(prompt, LENGTH):
        logits, cache = decode(config, weights, cache, tokens[:, position])
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-5)


def test_all_retrieval_equals_the_plain_model():
    config, weights = split(ALL)
    tokens = tokens_of()
    _, logits, _ = read(config, weights, tokens, chunk=16)
    x, _ = llama.hidden_states(CONFIG, params(), tokens)
    np.testing.assert_allclose(logits[:, -1], llama.logits(CONFIG, params(), x)[:, -1], atol=2e-5)


@pytest.mark.parametrize("mode", ["exact", "chunk"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_rows_of_different_lengths_equal_each_row_alone(heads, mode):
    config, weights = split(heads)
    lengths, chunk = [LENGTH, 1, 11, 24], 8
    tokens = tokens_of(batch=len(lengths))
    cache = init_cache(config, batch_size=len(lengths), max_len=LENGTH + 5)
    final = jnp.zeros((len(lengths), RAW["vocab_size"]))
    for first in range(0, LENGTH, chunk):
        part = tokens[:, first : first + chunk]
        part = jnp.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        num = jnp.clip(jnp.array(lengths) - first, 0, chunk)
        logits, cache = prefill(config, weights, cache, part, num, mode=mode)
        final = jnp.where((num > 0)[:, None], logits, final)
    # A row that stopped stays as it is, and does not disturb the others.
    active = jnp.array([True, True, False, True])
    then, cache = decode(config, weights, cache, tokens[:, 0], active)
    assert cache.lengths.tolist() == [LENGTH + 1, 2, 11, 25]
    again, cache = decode(config, weights, cache, tokens[:, 0])

    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1]
        _, logits, cache = read(config, weights, alone[:, :length], chunk=chunk, mode=mode)
        np.testing.assert_allclose(final[row], logits[0, -1], atol=2e-5)
        if active[row]:
            logits, cache = decode(config, weights, cache, alone[:, 0])
            np.testing.assert_allclose(then[row], logits[0], atol=2e-5)
        logits, _ = decode(config, weights, cache, alone[:, 0])
        np.testing.assert_allclose(again[row], logits[0], atol=2e-5)


def test_rows_may_be_appended_to_at_different_lengths():
    config, weights = split(MIXED)
    tokens = tokens_of()
    _, _, cache = read(config, weights, tokens[:, :9], chunk=9)
    cache = decode(config, weights, cache, tokens[:, 9], jnp.array([True, False]))[1]
    part = jnp.stack([tokens[0, 10:22], tokens[1, 9:21]])
    logits, _ = prefill(config, weights, cache, part, jnp.array([12, 12]))
    expected = masked_logits(MIXED, tokens)
    np.testing.assert_allclose(logits[0], expected[0, 21], atol=2e-5)
    np.testing.assert_allclose(logits[1], expected[1, 20], atol=2e-5)


@pytest.mark.parametrize("chunk", [5, SINK + RECENT + 1])
def test_chunk_mode_shows_streaming_heads_the_cache_and_their_whole_chunk(chunk, monkeypatch):
    config, weights = split(MIXED)
    tokens = tokens_of()
    ends, logits, _ = read(config, weights, tokens, chunk=chunk, mode="chunk")

    def reference_mask(q_positions, kv_positions, *, sink_size, recent_size):
        i, j = q_positions[:, None], kv_positions[None, :]
        begins = i // chunk * chunk
        return (j <= i) & ((j < sink_size) | (j >= begins - recent_size))

    monkeypatch.setattr(masks, "streaming", reference_mask)
    np.testing.assert_allclose(logits, masked_logits(MIXED, tokens)[:, ends], atol=2e-5)


def test_chunk_mode_of_one_chunk_is_dense():
    config, weights = split(NONE)
    tokens = tokens_of()
    _, logits, _ = read(config, weights, tokens, chunk=LENGTH, mode="chunk")
    np.testing.assert_allclose(logits[:, 0], masked_logits(ALL, tokens)[:, -1], atol=2e-5)


@pytest.mark.parametrize("name", models.CASES)
def test_every_family_is_served(name):
    raw = models.CASES[name]
    config = parse_config(raw)
    weights = llama.init_params(config, jax.random.key(1))
    rng = np.random.default_rng(0)
    heads = rng.random((config.num_layers, config.num_kv_heads)) < 0.5
    duo, split_weights = split(heads, config=config, weights=weights)
    tokens = jnp.asarray(models.tokens(raw, length=30))
    expected = masked_logits(heads, tokens, config=config, weights=weights, total_length=30)
    cache = init_cache(duo, batch_size=2, max_len=32)
    for first in (0, 15):
        logits, cache = prefill(
            duo,
            split_weights,
            cache,
            tokens[:, first : first + 15],
            jnp.array([15, 15]),
            total_lengths=jnp.array([30, 30]),
        )
    np.testing.assert_allclose(logits, expected[:, -1], atol=3e-5)


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (0, 5), (3, 1), (50, 50)])
def test_unusual_sizes(sink, recent):
    config, weights = split(MIXED, sink=sink, recent=recent)
    tokens = tokens_of()
    expected = masked_logits(MIXED, tokens, sink=sink, recent=recent)
    ends, logits, cache = read(config, weights, tokens[:, :30], chunk=12)
    np.testing.assert_allclose(logits, expected[:, ends], atol=2e-5)
    for position in range(30, LENGTH):
        logits, cache = decode(config, weights, cache, tokens[:, position])
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-5)


def test_hidden_states_are_those_of_every_token():
    config, weights = split(MIXED)
    tokens = tokens_of()
    cache = init_cache(config, batch_size=2, max_len=LENGTH)
    x, _ = serve.hidden_states(config, weights, cache, tokens, jnp.array([LENGTH, LENGTH]))
    logits = serve.logits(config, weights, x)
    np.testing.assert_allclose(logits, masked_logits(MIXED, tokens), atol=2e-5)
