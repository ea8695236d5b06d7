"""Full heads that one buffer cannot hold, since kernels count elements in 32 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.serving import shapes
from duo_jax import serve
from duo_jax.cache import cache_shapes, grow, init_cache
from duo_jax.heads.split import DuoConfig, duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import ahead_of_time
from kernels import address_limit
from tests import models
from tests.params import random_params

RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=1)
CONFIG = parse_config(RAW)
HEADS = np.array([[1, 1, 0, 1]], bool)
SPLIT = duo_config(CONFIG, HEADS, sink_size=4, recent_size=6)
MAX_LEN = 200


def heads_per_buffer(cache) -> list[int]:
    return [part.keys.shape[1] for part in cache.layers[0].full]


@pytest.fixture
def small_buffers(monkeypatch):
    """As if kernels could address two heads of 200 tokens, or one of more."""
    monkeypatch.setattr(address_limit, "MAX_ELEMENTS", 2 * MAX_LEN * CONFIG.head_dim)


def logits_after(implementation: str, *, grows: bool):
    """Read 21 tokens, in one go or with a cache that grows before the last of them."""
    weights = split_params(CONFIG, random_params(CONFIG), HEADS)
    cache = init_cache(SPLIT, batch_size=1, max_len=MAX_LEN)
    tokens = jnp.asarray(models.tokens(RAW, batch=1, length=21))
    read = jax.jit(functools.partial(serve.prefill, SPLIT, implementation=implementation))
    for part in (tokens[:, :20], tokens[:, 20:]) if grows else (tokens,):
        logits, cache = read(weights, cache, part, jnp.array([part.shape[1]]))
        if grows:
            cache = grow(cache, max_len=MAX_LEN + 8)
    return logits, cache


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_several_buffers_give_what_one_gives(monkeypatch, implementation):
    expected, cache = logits_after("xla", grows=False)
    assert heads_per_buffer(cache) == [3]
    monkeypatch.setattr(address_limit, "MAX_ELEMENTS", 2 * MAX_LEN * CONFIG.head_dim)
    logits, cache = logits_after(implementation, grows=True)
    assert heads_per_buffer(cache) == [1, 1, 1]  # it grew beyond two heads a buffer
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.usefixtures("small_buffers")
def test_heads_are_shared_out_by_what_fits():
    assert heads_per_buffer(init_cache(SPLIT, batch_size=1, max_len=MAX_LEN)) == [2, 1]
    assert heads_per_buffer(init_cache(SPLIT, batch_size=2, max_len=MAX_LEN)) == [1, 1, 1]
    assert heads_per_buffer(init_cache(SPLIT, batch_size=1, max_len=50)) == [3]


def compile_a_layer_at_four_million_tokens(chunk: int) -> list[int]:
    """Compile a layer of Llama-3-8B whose heads all retrieve; return the sizes of its buffers."""
    architecture = shapes.model_config("gqa", layers=1)
    config = DuoConfig(architecture=architecture, retrieval_counts=(8,))
    if chunk:
        ahead_of_time.prefill_chunk(config, target="h200", max_len=4_000_000, chunk=chunk)
    else:
        ahead_of_time.decode_step(config, target="h200", max_len=4_000_000)
    cache = cache_shapes(config, batch_size=1, max_len=4_000_000, dtype="bfloat16")
    return [leaf.size for leaf in jax.tree.leaves(cache.layers)]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 512], ids=["decode", "prefill"])
def test_a_layer_of_retrieval_heads_only_compiles_at_four_million_tokens(compiler, chunk):
    sizes = compiler.call(compile_a_layer_at_four_million_tokens, chunk)
    assert max(sizes) <= address_limit.MAX_ELEMENTS
    assert sum(sizes) > 3 * address_limit.MAX_ELEMENTS


def test_a_buffer_that_kernels_cannot_address_is_refused():
    from kernels import decode_attention

    def of(slots):
        kv = jax.ShapeDtypeStruct((1, 1, slots, 128), jnp.bfloat16)
        q = jax.ShapeDtypeStruct((1, 4, 128), jnp.bfloat16)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        run = functools.partial(decode_attention, softmax_scale=1.0, implementation="interpret")
        return jax.eval_shape(run, q, kv, kv, lengths)

    assert of(2**24 - 1)[0].shape == (1, 4, 128)
    with pytest.raises(NotImplementedError, match=r"2,147,483,648 elements; .* end at 2,147,483,6"):
        of(2**24)
