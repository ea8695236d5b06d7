"""Serving with quantised caches: what a token sees, in every format, however the text is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import KVCache, cache_bytes, grow, init_cache
from duo_jax.cache.update import as_cached
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig, duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import attention
from duo_jax.session import cache_files
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from kernels import packed
from tests import models
from tests.params import random_params

RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=1, head_dim=16)
CONFIG = dataclasses.replace(parse_config(RAW), max_positions=2048)
HEADS = np.array([[1, 1, 0, 1]], bool)
SPLIT = duo_config(CONFIG, HEADS, sink_size=4, recent_size=6)
FORMATS = ("model", "bf16", "int8", "int4", "int2")
LENGTH = 210
PIECES = [*[1] * 3, 64, 64, 64, *[1] * 15]  # across the blocks that "int2" packs, few programs


@pytest.fixture(scope="module")
def params():
    return split_params(CONFIG, random_params(CONFIG), HEADS)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(models.tokens(RAW, batch=2, length=LENGTH))


@functools.cache
def reader(mode: str, implementation: str):
    read = functools.partial(serve.prefill, SPLIT, mode=mode, implementation=implementation)
    return jax.jit(read)


def read(params, tokens, kv: str, cuts, *, mode="exact", implementation="xla"):
    """Read two rows in chunks; the second row lags behind by 3 tokens."""
    cache, last = init_cache(SPLIT, batch_size=2, max_len=256, kv=kv), 0.0
    behind = np.array([0, 3])
    for cut in cuts:
        at = np.asarray(cache.lengths)
        counts = np.minimum(cut, LENGTH - behind - at)
        rows = [row[n : n + cut] for row, n in zip(tokens, at, strict=True)]
        chunk = np.array([np.pad(row, (0, cut - len(row))) for row in rows])
        logits, cache = reader(mode, implementation)(
            params, cache, jnp.asarray(chunk), jnp.asarray(counts, jnp.int32)
        )
        last = np.where((counts > 0)[:, None], logits, last)
    return last, cache


def relative(x, reference) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


# Another order of additions may tip a number over to the next code; in 8 bits that is little.
SLACK = {"bf16": 1e-2, "int8": 1e-3, "int4": 1e-2, "int2": 2e-2}


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_how_a_text_is_cut_does_not_matter(kv, params, tokens):
    """Prefill in chunks, then token by token, rows of different lengths: as in one go.

    In a layer by itself, tests below compare both with what a token sees by the definition.
    """
    whole, cache = read(params, tokens, kv, [LENGTH])
    parts, other = read(params, tokens, kv, PIECES)
    np.testing.assert_array_equal(cache.lengths, other.lengths)
    assert relative(parts, whole) < SLACK[kv]


@pytest.mark.slow
def test_fewer_bits_err_more_and_take_less(params, tokens):
    exact, cache = read(params, tokens, "model", [LENGTH])
    errors, sizes = [], [cache.nbytes]
    for kv in ("int8", "int4"):
        logits, cache = read(params, tokens, kv, [LENGTH])
        errors.append(relative(logits, exact))
        sizes.append(cache.nbytes)
    assert 1e-4 < errors[0] < 0.02 < 5 * errors[0] < errors[1] < 0.3
    assert sizes[0] > 2.5 * sizes[1] > 3 * sizes[2]


@pytest.mark.slow
# int8 and int4 differ from int2 in kernels.packed, and have no ring of the latest tokens.
@pytest.mark.parametrize("kv", ["int4", "int2"])
def test_kernels_serve_the_same_tokens(kv, params, tokens):
    cuts = [64, 64, 1, 1]
    expected, _ = read(params, tokens, kv, cuts)
    logits, _ = read(params, tokens, kv, cuts, implementation="interpret")
    assert relative(logits, expected) < SLACK[kv]
    np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


def dense(q, k, v, visible):
    """Attend densely in float64; `visible` [batch, q_len, kv_len]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, np.einsum("bnts,bsnh->btnh", weights, v)


@functools.cache
def jitted_attention(config: DuoConfig):
    attend = functools.partial(attention.attend, config=config, mode="exact", implementation="xla")
    return jax.jit(attend)


def one_layer(kv: str, q, k, v, cuts, *, retrieval: int):
    """Attend with one layer's caches, chunk by chunk; return the output at every position."""
    config = DuoConfig(
        architecture=dataclasses.replace(CONFIG, num_layers=1),
        retrieval_counts=(retrieval,),
        sink_size=4,
        recent_size=6,
    )
    cache = init_cache(config, batch_size=2, max_len=256, kv=kv)
    attend = jitted_attention(config)
    lengths, outs, layer = cache.lengths, [], cache.layers[0]
    for cut in cuts:
        at = int(lengths[0])
        parts = (x[:, at : at + cut] for x in (q, k, v))
        num_tokens = jnp.full(2, cut, jnp.int32)
        place = attention.LayerInput(
            cache=layer, lengths=lengths, kept=lengths, num_tokens=num_tokens
        )
        out, layer = attend(*parts, place)
        outs.append(out)
        lengths = lengths + cut
    return np.concatenate(outs, axis=1)


def draw_qkv():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, LENGTH, 8, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, LENGTH, 4, 16)).astype(np.float32)
    return q, k, v


@functools.partial(jax.jit, static_argnums=1)
def rounded(x, layout: packed.Layout):
    """Return [batch, length, kv_heads, head_dim] as a cache of this layout holds it."""
    stored = packed.pack(jnp.swapaxes(x, 1, 2), layout)
    return jnp.swapaxes(packed.unpack(stored), 1, 2)


CUTS = {"at once": [LENGTH], "in pieces": PIECES}
# By default two of the three are seen together, in every combination.
SEEN = [
    pytest.param(
        4 * (heads == "retrieval"),
        kv,
        CUTS[cuts],
        id=f"{heads}-{kv}-{cuts}",
        marks=[pytest.mark.slow] * ((heads == "retrieval") ^ (kv == "int8") ^ (cuts == "at once")),
    )
    for heads in ("retrieval", "streaming")
    for kv in ("int8", "int4")
    for cuts in CUTS
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("retrieval", "kv", "cuts"), SEEN)
def test_tokens_are_seen_as_the_cache_holds_them(retrieval, kv, cuts):
    q, k, v = draw_qkv()
    layout = {"int8": packed.INT8, "int4": packed.INT4}[kv]
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    visible = j <= i
    if not retrieval:
        visible &= (j < 4) | (i - j < 6)
    _, expected = dense(
        q, rounded(k, layout), rounded(v, layout), np.broadcast_to(visible, (2, LENGTH, LENGTH))
    )
    got = one_layer(kv, q, k, v, cuts, retrieval=retrieval)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuts",
    [CUTS["at once"], CUTS["in pieces"]],
    ids=["at once", "in pieces"],
)
def test_int2_sees_the_latest_64_tokens_exactly_and_older_ones_as_codes(cuts):
    q, k, v = draw_qkv()
    whole_blocks = [(0, 0), (0, -LENGTH % 64), (0, 0), (0, 0)]
    keys, values = (
        np.asarray(rounded(np.pad(x, whole_blocks), layout))[:, :LENGTH]
        for x, layout in ((k, packed.INT2_KEYS), (v, packed.INT2_VALUES))
    )
    expected = np.zeros_like(q)
    for position in range(LENGTH):
        latest = np.arange(LENGTH)[None, :, None, None] > position - 64
        visible = np.broadcast_to(np.arange(LENGTH) <= position, (2, 1, LENGTH))
        at = slice(position, position + 1)
        _, out = dense(q[:, at], np.where(latest, k, keys), np.where(latest, v, values), visible)
        expected[:, at] = out
    got = one_layer("int2", q, k, v, cuts, retrieval=4)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_int2_leaves_streaming_heads_exact():
    q, k, v = draw_qkv()
    got = one_layer("int2", q, k, v, PIECES, retrieval=0)
    np.testing.assert_array_equal(got, one_layer("model", q, k, v, PIECES, retrieval=0))


@pytest.mark.parametrize("kv", FORMATS)
def test_bytes_are_those_of_the_formula_and_of_what_a_grown_cache_takes(kv):
    cache = init_cache(SPLIT, batch_size=2, max_len=100, kv=kv)
    sizes = {"batch_size": 2, "dtype": jnp.float32, "kv": kv}
    assert cache.nbytes == cache_bytes(SPLIT, max_len=100, **sizes)
    assert grow(cache, max_len=300).nbytes == cache_bytes(SPLIT, max_len=300, **sizes)


@pytest.mark.slow  # test_cache_files.py saves and loads int4, test_cache.py grows every format
@pytest.mark.parametrize("kv", ["bf16", "int4", "int2"])
def test_a_grown_or_saved_cache_goes_on_to_the_bit(kv, params, tokens, tmp_path):
    def session():
        return Session(
            Runtime(config=SPLIT, params=params, kv_format=kv, prefill_chunk=50), batch_size=2
        )

    rows, more = (
        [row[:n].tolist() for row, n in zip(tokens, (150, 77), strict=True)],
        [[5] * 50] * 2,
    )
    roomy, tight = session(), session()
    roomy.append(rows, room=500)
    tight.append(rows, room=1)
    cache_files.save(tight, tmp_path / "saved", extra={})
    loaded = session()
    cache_files.load(loaded, tmp_path / "saved")
    for one in (roomy, tight, loaded):
        one.append(more, room=1)
    assert roomy.capacity > tight.capacity
    expected = roomy.snapshot().logits
    np.testing.assert_array_equal(tight.snapshot().logits, expected)
    np.testing.assert_array_equal(loaded.snapshot().logits, expected)


@pytest.mark.slow  # tests above compare each row with what it sees by the definition
@pytest.mark.parametrize("kv", ["int8", "int4", "int2"])
def test_rows_do_not_see_each_other(kv, params, tokens):
    expected, _ = read(params, tokens, kv, [64, 64, 1])
    other = tokens.copy()
    other[1] = other[1, ::-1]
    logits, _ = read(params, other, kv, [64, 64, 1])
    np.testing.assert_array_equal(logits[0], expected[0])
    assert not np.array_equal(logits[1], expected[1])


@pytest.mark.slow
def test_bf16_caches_of_a_float32_model_hold_bfloat16(params, tokens):
    logits, cache = read(params, tokens, "bf16", [LENGTH])
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    exact, _ = read(params, tokens, "model", [LENGTH])
    assert 1e-4 < relative(logits, exact) < 0.02


def test_numbers_that_are_not_quantised_are_not_touched():
    x = jnp.ones((1, 3, 2, 16))
    plain = KVCache(keys=jnp.zeros((1, 2, 8, 16)), values=jnp.zeros((1, 2, 8, 16)))
    assert as_cached(plain, x, x) == (x, x)


def test_unknown_formats_and_head_dims_are_refused(params):
    with pytest.raises(InputError, match="KV format 'int3' is not one of model, bf16, int8, int4"):
        Runtime(config=SPLIT, params=params, kv_format="int3")
    odd = dataclasses.replace(SPLIT, architecture=dataclasses.replace(CONFIG, head_dim=20))
    with pytest.raises(InputError, match="KV format int4 needs a head_dim that is a multiple of 8"):
        init_cache(odd, batch_size=1, max_len=64, kv="int4")
    init_cache(odd, batch_size=1, max_len=64, kv="int8")
