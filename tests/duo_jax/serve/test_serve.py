"""Properties of a split model with two caches, on tiny random models in float32."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from kernels import masks
from tests import models
from tests.params import random_params

pytestmark = pytest.mark.core

SINK, RECENT = 4, 6
LENGTH = 37  # the ring wraps several times
RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=3)
CONFIG = parse_config(RAW)
# Layers with some, no and only retrieval heads, and none of them in order: every kind of layer.
MIXED = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
ALL, NONE = np.ones((1, 4), bool), np.zeros((1, 4), bool)
HEADS = {"mixed": MIXED, "all retrieval": ALL, "all streaming": NONE}

# Where the kinds of layers do not matter, one of the first kind compiles faster.
ONE_LAYER = parse_config(RAW | {"num_hidden_layers": 1})
SOME = MIXED[:1]
HEADS["one layer"] = SOME

# Cached by configuration, so every test with the same shapes shares one compiled program.
params = functools.cache(random_params)
prefill = jax.jit(serve.prefill, static_argnums=0, static_argnames="mode", donate_argnums=2)
decode = jax.jit(serve.decode, static_argnums=0, donate_argnums=2)


def split(heads, *, config=None, weights=None, sink=SINK, recent=RECENT):
    config = config or (ONE_LAYER if len(heads) == 1 else CONFIG)
    weights = params(config) if weights is None else weights
    return (
        duo_config(config, heads, sink_size=sink, recent_size=recent),
        split_params(config, weights, heads),
    )


@functools.partial(jax.jit, static_argnames=("config", "mask", "sink", "recent", "total_length"))
def _masked_logits(weights, heads, tokens, *, config, mask, sink, recent, total_length):
    def attend(q, k, v, is_retrieval):
        positions = jnp.arange(q.shape[1])
        causal = masks.causal(positions, positions)
        window = mask(positions, positions, sink_size=sink, recent_size=recent)
        visible = jnp.where(is_retrieval[:, None, None], causal[None], window[None])
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(visible[None, :, None], scores, -jnp.inf)
        out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
        return out.reshape(*out.shape[:2], -1, out.shape[-1]), None

    x, _ = llama.hidden_states(
        config, weights, tokens, attend=attend, layer_inputs=heads, total_length=total_length
    )
    return llama.logits(config, weights, x)


def masked_logits(
    heads,
    tokens,
    *,
    config=None,
    weights=None,
    sink=SINK,
    recent=RECENT,
    mask=masks.streaming,
    total_length=None,
):
    """Run the unsplit model at once, every head at full length behind its mask."""
    config = config or (ONE_LAYER if len(heads) == 1 else CONFIG)
    weights = params(config) if weights is None else weights
    return np.asarray(
        _masked_logits(
            weights,
            jnp.asarray(heads),
            tokens,
            config=config,
            mask=mask,
            sink=sink,
            recent=recent,
            total_length=total_length,
        )
    )


def tokens_of(batch=2, length=LENGTH, seed=0):
    return models.tokens(RAW, batch=batch, length=length, seed=seed)


def read(config, weights, tokens, *, chunk, mode="exact", max_len=LENGTH + 3, dtype=jnp.float32):
    """Prefill in chunks; return the logits after every chunk and the cache."""
    cache = init_cache(config, batch_size=tokens.shape[0], max_len=max_len, dtype=dtype)
    ends, seen = [], []
    for first in range(0, tokens.shape[1], chunk):
        part = np.asarray(tokens)[:, first : first + chunk]
        num = np.full(len(part), part.shape[1], np.int32)
        part = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        logits, cache = prefill(
            config, weights, cache, jnp.asarray(part), jnp.asarray(num), mode=mode
        )
        ends.append(first + int(num[0]) - 1)
        seen.append(np.asarray(logits))
    return np.array(ends), np.stack(seen, axis=1), cache


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "chunk"),
    [("one layer", SINK + RECENT + 1), ("mixed", 7), ("all retrieval", 7), ("all streaming", 7)]
    + [pytest.param("one layer", n, marks=pytest.mark.slow) for n in (1, SINK, LENGTH + 3)],
)
def test_prefill_in_chunks_equals_one_masked_forward(name, chunk):
    config, weights = split(HEADS[name])
    tokens = tokens_of()
    ends, logits, cache = read(config, weights, tokens, chunk=chunk)
    expected = masked_logits(HEADS[name], tokens)
    np.testing.assert_allclose(logits, expected[:, ends], atol=2e-5)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("mixed", prompt) for prompt in (1, 3, SINK + RECENT - 1, SINK + RECENT, 20)]
    + [("all retrieval", 3), ("all streaming", 3)],
)
def test_prefill_then_decode_equals_one_forward_at_every_position(name, prompt):
    config, weights = split(HEADS[name])
    tokens = tokens_of()
    expected = masked_logits(HEADS[name], tokens)
    # A chunk of 7: already compiled.
    _, _, cache = read(config, weights, tokens[:, :prompt], chunk=7)
    for position in range(prompt, LENGTH):
        logits, cache = decode(config, weights, cache, jnp.asarray(tokens[:, position]))
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-5)


def test_all_retrieval_equals_the_plain_model():
    config, weights = split(ALL)
    tokens = tokens_of()
    _, logits, _ = read(config, weights, tokens, chunk=7)
    expected = jax.jit(
        lambda weights, tokens: llama.logits(
            ONE_LAYER, weights, llama.hidden_states(ONE_LAYER, weights, tokens)[0]
        )
    )(params(ONE_LAYER), tokens)
    np.testing.assert_allclose(logits[:, -1], expected[:, -1], atol=2e-5)


@pytest.mark.parametrize("mode", ["exact", pytest.param("chunk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("short", [1, 24])
def test_rows_of_different_lengths_equal_each_row_alone(mode, short):
    config, weights = split(SOME)
    lengths, chunk = [LENGTH, short], SINK + RECENT + 1
    tokens = tokens_of(batch=len(lengths))
    cache = init_cache(config, batch_size=len(lengths), max_len=LENGTH + 3)
    final = np.zeros((len(lengths), RAW["vocab_size"]))
    for first in range(0, LENGTH, chunk):
        part = tokens[:, first : first + chunk]
        part = jnp.asarray(np.pad(part, ((0, 0), (0, chunk - part.shape[1]))))
        num = np.clip(np.array(lengths) - first, 0, chunk)
        logits, cache = prefill(config, weights, cache, part, jnp.asarray(num), mode=mode)
        final = np.where((num > 0)[:, None], logits, final)
    # A row that stopped stays as it is, and does not disturb the others.
    active = jnp.array([True, False])
    then, cache = decode(config, weights, cache, jnp.asarray(tokens[:, 0]), active)
    assert cache.lengths.tolist() == [LENGTH + 1, short]
    everybody = jnp.ones(len(lengths), bool)
    again, cache = decode(config, weights, cache, jnp.asarray(tokens[:, 0]), everybody)

    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1]
        first_token = jnp.asarray(alone[:, 0])
        _, logits, cache = read(config, weights, alone[:, :length], chunk=chunk, mode=mode)
        np.testing.assert_allclose(final[row], logits[0, -1], atol=2e-5)
        if active[row]:
            logits, cache = decode(config, weights, cache, first_token)
            np.testing.assert_allclose(then[row], logits[0], atol=2e-5)
        logits, _ = decode(config, weights, cache, first_token)
        np.testing.assert_allclose(again[row], logits[0], atol=2e-5)


@pytest.mark.slow
def test_rows_may_be_appended_to_at_different_lengths():
    config, weights = split(MIXED)
    tokens = tokens_of()
    _, _, cache = read(config, weights, tokens[:, :7], chunk=7)
    step = jnp.asarray(tokens[:, 7])
    cache = decode(config, weights, cache, step, jnp.array([True, False]))[1]
    part = jnp.asarray(np.stack([tokens[0, 8:15], tokens[1, 7:14]]))
    logits, _ = prefill(config, weights, cache, part, jnp.array([7, 7]), mode="exact")
    expected = masked_logits(MIXED, tokens)
    np.testing.assert_allclose(logits[0], expected[0, 14], atol=2e-5)
    np.testing.assert_allclose(logits[1], expected[1, 13], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [pytest.param("mixed", 5, marks=pytest.mark.slow), ("one layer", SINK + RECENT + 1)],
)
def test_chunk_mode_shows_streaming_heads_the_cache_and_their_whole_chunk(name, chunk):
    config, weights = split(HEADS[name])
    tokens = tokens_of()
    ends, logits, _ = read(config, weights, tokens, chunk=chunk, mode="chunk")

    def reference_mask(q_positions, kv_positions, *, sink_size, recent_size):
        i, j = q_positions[:, None], kv_positions[None, :]
        begins = i // chunk * chunk
        return (j <= i) & ((j < sink_size) | (j >= begins - recent_size))

    expected = masked_logits(HEADS[name], tokens, mask=reference_mask)
    np.testing.assert_allclose(logits, expected[:, ends], atol=2e-5)


def test_chunk_mode_of_one_chunk_is_dense():
    config, weights = split(NONE)
    tokens = tokens_of()
    _, logits, _ = read(config, weights, tokens, chunk=LENGTH, mode="chunk")
    np.testing.assert_allclose(logits[:, 0], masked_logits(ALL, tokens)[:, -1], atol=2e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", models.BY_SERVING)
def test_every_family_is_served(name):
    raw = models.CASES[name]
    config = parse_config(raw | {"num_hidden_layers": 1})
    rng = np.random.default_rng(0)
    heads = rng.random((config.num_layers, config.num_kv_heads)) < 0.5
    duo, weights = split(heads, config=config)
    tokens = models.tokens(raw, length=30)
    expected = masked_logits(heads, tokens, config=config, total_length=30)
    cache = init_cache(duo, batch_size=2, max_len=32)
    for first in (0, 15):
        logits, cache = prefill(
            duo,
            weights,
            cache,
            tokens[:, first : first + 15],
            jnp.array([15, 15]),
            total_lengths=jnp.array([30, 30]),
        )
    np.testing.assert_allclose(logits, expected[:, -1], atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (3, 1), (50, 50)])
def test_unusual_sizes(sink, recent):
    config, weights = split(SOME, sink=sink, recent=recent)
    tokens = tokens_of()
    expected = masked_logits(SOME, tokens, sink=sink, recent=recent)
    ends, logits, cache = read(config, weights, tokens[:, :30], chunk=12)
    np.testing.assert_allclose(logits, expected[:, ends], atol=2e-5)
    for position in range(30, LENGTH):
        logits, cache = decode(config, weights, cache, jnp.asarray(tokens[:, position]))
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-5)


HALVES = [(jnp.float16, 12), (jnp.float16, LENGTH), (jnp.bfloat16, LENGTH)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [(jnp.bfloat16, 12), *HALVES],
)
def test_half_precision_errs_at_most_twice_as_much_as_the_plain_model(dtype, chunk):
    """Against the same rounded weights in float32; the plain model sets the scale."""
    rounded = random_params(ONE_LAYER, dtype=dtype)
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), rounded)
    config, weights = split(SOME, weights=rounded)
    tokens = tokens_of(batch=8)

    @jax.jit
    def plain(weights, tokens):
        x, _ = llama.hidden_states(ONE_LAYER, weights, tokens)
        return llama.logits(ONE_LAYER, weights, x)

    def rms(error):
        return np.sqrt(np.mean(np.square(np.asarray(error, np.float32))))

    yardstick = rms(np.asarray(plain(rounded, tokens), np.float32) - plain(wide, tokens))
    if chunk == LENGTH:  # one chunk is dense in "chunk" mode
        _, logits, _ = read(config, weights, tokens, chunk=LENGTH, mode="chunk", dtype=dtype)
        error = logits[:, 0].astype(np.float32) - np.asarray(plain(wide, tokens)[:, -1])
        assert rms(error) <= 2 * yardstick
        return
    expected = masked_logits(SOME, tokens, weights=wide)
    ends, logits, cache = read(config, weights, tokens[:, :30], chunk=12, dtype=dtype)
    assert logits.dtype == dtype
    assert rms(logits.astype(np.float32) - expected[:, ends]) <= 2 * yardstick
    logits, cache = decode(config, weights, cache, jnp.asarray(tokens[:, 30]))
    assert rms(np.asarray(logits, np.float32) - expected[:, 30]) <= 2 * yardstick
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(dtype)}


def test_hidden_states_are_those_of_every_token():
    config, weights = split(SOME)
    tokens = jnp.asarray(tokens_of())
    cache = init_cache(config, batch_size=2, max_len=LENGTH)

    @functools.partial(jax.jit, static_argnums=0)
    def every_logit(config, weights, cache, tokens):
        num_tokens = jnp.array([LENGTH, LENGTH])
        x, _ = serve.hidden_states(config, weights, cache, tokens, num_tokens)
        return serve.logits(config, weights, x)

    logits = every_logit(config, weights, cache, tokens)
    np.testing.assert_allclose(logits, masked_logits(SOME, tokens), atol=2e-5)


@pytest.mark.slow
def test_decode_can_be_vmapped():
    """Two continuations of one text, as a beam search would try them."""
    config, weights = split(SOME)
    tokens = tokens_of()
    _, _, cache = read(config, weights, tokens[:, :11], chunk=SINK + RECENT + 1)
    choices = jnp.asarray(tokens[:, 11:13].T)  # [choices, batch]
    step = functools.partial(serve.decode, config, jax.device_put(weights))
    together, _ = jax.jit(jax.vmap(step, in_axes=(None, 0)))(cache, choices)
    step = jax.jit(step)
    for choice, logits in zip(choices, together, strict=True):
        alone, _ = step(cache, choice)
        np.testing.assert_allclose(logits, alone, atol=2e-5)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from duo_jax import serve
from duo_jax.cache import init_cache
from tests.duo_jax.serve.test_serve import LENGTH, SOME, split, tokens_of

config, weights = split(SOME)
mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
rows, copy = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
prefill = jax.jit(serve.prefill, static_argnums=0)
inputs = jnp.asarray(tokens_of()), jnp.array([LENGTH, 20])
cache = init_cache(config, batch_size=2, max_len=LENGTH)
expected, _ = prefill(config, weights, cache, *inputs)
logits, cache = prefill(
    config,
    jax.device_put(weights, copy),
    jax.device_put(cache, rows),
    *(jax.device_put(x, rows) for x in inputs),
)
assert len(cache.layers[0].full[0].keys.sharding.device_set) == 2
assert cache.layers[0].full[0].keys.addressable_shards[0].data.shape[0] == 1
np.testing.assert_allclose(logits, expected, atol=2e-5)
print("the same")
"""


@pytest.mark.slow
def test_rows_can_be_sharded_over_devices():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", _SHARDED], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "the same\n", done.stderr
