"""Given tokens, decoded one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import init_cache
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve.teacher_forcing import decode_given, decode_tokens
from tests import models
from tests.params import random_params

RAW = models.llama(num_hidden_layers=1)
ARCHITECTURE = parse_config(RAW)
HEADS = np.arange(ARCHITECTURE.num_kv_heads)[None, :] % 2 == 0
CONFIG = duo_config(ARCHITECTURE, HEADS, sink_size=2, recent_size=3)


@pytest.mark.slow
def test_every_row_gets_its_own_tokens():
    params = split_params(ARCHITECTURE, random_params(ARCHITECTURE), HEADS)
    tokens = jnp.asarray(models.tokens(RAW, batch=2, length=9))
    lengths = np.array([7, 4])
    active = jnp.asarray(np.arange(9) < lengths[:, None])
    empty = init_cache(CONFIG, batch_size=2, max_len=16)
    streams, cache = decode_tokens(CONFIG, params, empty, tokens, active, implementation="xla")
    logits = serve.logits(CONFIG, params, streams)
    assert cache.lengths.tolist() == lengths.tolist()
    read = jax.jit(serve.prefill, static_argnums=0)
    for t in (0, 3, 4, 6):
        new = init_cache(CONFIG, batch_size=2, max_len=16)
        expected, _ = read(CONFIG, params, new, tokens, jnp.array([t + 1, t + 1]))
        rows = np.asarray(active[:, t])
        np.testing.assert_allclose(logits[rows, t], expected[rows], atol=2e-5)
    assert not streams[:, 7:].any()


def test_no_step_follows_the_last_active_token():
    def step(count, tokens, _):
        return jnp.stack([tokens, 2 * tokens], axis=1).astype(jnp.float32), count + 1

    tokens = jnp.arange(1, 11).reshape(2, 5)
    active = jnp.array([[True, False, False, False, False], [False, False, True, False, False]])
    (kept, at), count = decode_given(
        step, jnp.array(0), tokens, active, keep=lambda x, t: (x[:, 1], jnp.full(2, t))
    )
    assert count == 3
    np.testing.assert_array_equal(kept, [[2, 4, 6, 0, 0], [12, 14, 16, 0, 0]])
    np.testing.assert_array_equal(at, [[0, 1, 2, 0, 0]] * 2)
