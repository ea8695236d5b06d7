"""A cache that went on and came back is as if it had not gone on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import init_cache, mark, rewind
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve.teacher_forcing import decode_tokens
from tests import models
from tests.params import random_params

RAW = models.llama(num_hidden_layers=1, head_dim=16)
ARCHITECTURE = parse_config(RAW)
HEADS = np.arange(ARCHITECTURE.num_kv_heads)[None, :] % 2 == 0
CONFIG = duo_config(ARCHITECTURE, HEADS, sink_size=2, recent_size=3)


# 2 bits: the tokens that are appended complete a block of 64, and so does the text before them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv", "lengths"),
    [
        # int2 has rings and exact tokens too; int4 goes back in test_session.py.
        ("int2", (90, 61)),
        ("model", (9, 4)),
        ("int4", (9, 4)),
    ],
)
def test_rewound_caches_go_on_as_if_nothing_had_been_appended(kv, lengths):
    params = split_params(ARCHITECTURE, random_params(ARCHITECTURE), HEADS)
    text = jnp.asarray(models.tokens(RAW, batch=2, length=max(lengths)))
    other, more = (jnp.asarray(models.tokens(RAW, batch=2, length=40, seed=n)) for n in (1, 2))
    decode = functools.partial(decode_tokens, CONFIG, params, implementation="xla")

    def go_on(cache, tokens):
        return decode(cache, tokens, jnp.ones(tokens.shape, bool))

    read = jax.jit(functools.partial(serve.prefill, implementation="xla"), static_argnums=0)
    empty = init_cache(CONFIG, batch_size=2, max_len=160, kv=kv)
    _, cache = read(CONFIG, params, empty, text, jnp.asarray(lengths))
    expected, _ = go_on(jax.tree.map(jnp.copy, cache), more)
    here = mark(cache)
    _, cache = go_on(cache, other)
    again = rewind(cache, here)
    assert again.lengths.tolist() == list(lengths)
    found, cache = go_on(again, more)
    np.testing.assert_array_equal(found, expected)
    assert cache.lengths.tolist() == [n + 40 for n in lengths]
