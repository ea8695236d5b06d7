"""A paged cache serves what caches with a row of slots each serve, in every format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import serve
from duo_jax.cache import Cache, init_cache, pages
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import rows
from tests import models
from tests.params import random_params

pytestmark = pytest.mark.core

RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=1, head_dim=16)
CONFIG = parse_config(RAW | {"max_position_embeddings": 2048})
HEADS = np.array([[1, 0, 1, 1]], bool)
SPLIT = duo_config(CONFIG, HEADS, sink_size=4, recent_size=6)
# What is read into row 0 and row 2 of three, in turns; chunks that cross the borders of pages.
LENGTHS = {0: 150, 2: 90}
CUTS = {0: [(0, 100), (100, 130)], 2: [(0, 60), (60, 90)]}
LAST = 150


@functools.cache
def params(dtype):
    weights = split_params(CONFIG, random_params(CONFIG), HEADS)
    return jax.tree.map(lambda x: x.astype(dtype), weights)


def read_dense(tokens, kv, dtype, implementation):
    """Return logits after every step of one text that is read alone."""
    cache = init_cache(SPLIT, batch_size=1, max_len=192, dtype=dtype, kv=kv)
    read = jax.jit(
        functools.partial(serve.prefill, SPLIT, implementation=implementation), donate_argnums=1
    )
    seen = []
    for first, end in tokens[1]:
        chunk = np.zeros((1, 100 if end - first > 1 else 1), np.int32)
        chunk[0, : end - first] = tokens[0][first:end]
        logits, cache = read(params(dtype), cache, chunk, np.array([end - first], np.int32))
        seen.append(np.asarray(logits[0]))
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("kv", "implementation"),
    [
        ("bf16", "xla"),
        ("int4", "xla"),
        ("int2", "xla"),
        ("model", "xla"),
        ("model", "interpret"),
    ],
)
def test_rows_of_pages_equal_caches_of_their_own(kv, implementation):
    """In whatever order pages lie, with another row being read and decoded in between."""
    wide = kv.startswith("int") and implementation == "xla"  # codes flip where sums differ
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        texts = np.asarray(models.tokens(RAW, batch=3, length=LAST))
        cache = init_cache(
            SPLIT, batch_size=3, max_len=192, dtype=dtype, kv=kv, num_pages=9, page_size=64
        )
        layers, table = cache.layers, np.array([[7, 0, 3], [8, 8, 8], [5, 2, 6]], np.int32)
        held, seen = np.zeros(3, np.int32), {0: [], 2: []}
        run = {"implementation": implementation}
        for turn in range(2):
            for row, cuts in CUTS.items():
                first, end = cuts[turn]
                chunk = np.zeros((1, 100), np.int32)
                chunk[0, : end - first] = texts[row, first:end]
                place = [np.array([x], np.int32) for x in (end - first, first, end)]
                logits, layers = rows.prefill_row(
                    SPLIT,
                    params(dtype),
                    layers,
                    np.int32(row),
                    chunk,
                    *place,
                    table[row : row + 1],
                    **run,
                )
                seen[row].append(np.asarray(logits[0]))
                held[row] = end
        for step in range(20):  # row 2 reaches its third page, as row 0 did while it was read
            active = np.array([True, False, step < 15])
            at = np.minimum(held, LAST - 1)
            logits, layers = rows.decode_rows(
                SPLIT, params(dtype), layers, texts[np.arange(3), at], held, active, table, **run
            )
            for row in seen:
                if active[row]:
                    seen[row].append(np.asarray(logits[row]))
            held += active
        for row, cuts in CUTS.items():
            end = cuts[-1][1]
            steps = [*cuts, *((at, at + 1) for at in range(end, held[row]))]
            expected = read_dense((texts[row], steps), kv, dtype, implementation)
            tolerance = 3e-2 if kv == "bf16" else 1e-9 if wide else 2e-5
            np.testing.assert_allclose(seen[row], expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("unhooked")
def test_a_copied_row_and_page_go_on_alike():
    """A second request begins where the first one is: rings and an unfinished page are copied."""
    text = np.asarray(models.tokens(RAW, batch=1, length=100))
    cache = init_cache(SPLIT, batch_size=2, max_len=128, num_pages=4, page_size=64)
    place = [np.array([x], np.int32) for x in (100, 0, 100)]
    table = np.array([[3, 1], [3, 0]], np.int32)  # a common page, and one of their own
    run = {"implementation": "xla"}
    _, layers = rows.prefill_row(
        SPLIT, params(jnp.float32), cache.layers, np.int32(0), text, *place, table[:1], **run
    )
    layers = rows.copy_page(rows.copy_row(layers, np.int32(0), np.int32(1)), 1, 0)
    held, active = np.array([100, 100], np.int32), np.array([True, True])
    tokens = np.array([5, 5], np.int32)
    for _ in range(3):
        logits, layers = rows.decode_rows(
            SPLIT,
            params(jnp.float32),
            layers,
            tokens,
            held,
            active,
            table,
            **run,
        )
        np.testing.assert_array_equal(logits[0], logits[1])
        held = held + 1
    assert isinstance(cache, Cache)
    rings = pages.rings_of(layers)
    for leaf in jax.tree.leaves(rings):
        np.testing.assert_array_equal(leaf[0], leaf[1])
