"""Our model against transformers: norm, rope, attention, layer, logits."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.model import llama, rope
from tests import models
from tests.golden import generate

pytestmark = pytest.mark.core

RUNGS = ("norm", "rope_cos", "rope_sin", "attention", "layer", "logits")
ROWS = 4
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
every_family = pytest.mark.parametrize("raw", models.CASES.values(), ids=models.CASES.keys())


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens):
    return llama.Llama(config).apply(
        {"params": params},
        tokens,
        None,
        None,
        capture_intermediates=True,
        mutable=["intermediates"],
    )


def our_ladder(folder, tokens, *, dtype=None) -> dict[str, np.ndarray]:
    config = pretrained.load_config(folder)
    params = pretrained.load_params(folder, dtype=dtype)
    logits, state = run(config, params, jnp.asarray(tokens))
    layers = state["intermediates"]["layers"]
    cos, sin = rope.rotation(config, jnp.arange(tokens.shape[1])[None])
    rungs = {
        "norm": layers["input_layernorm"]["__call__"][0][0],
        "rope_cos": cos[0],
        "rope_sin": sin[0],
        "attention": layers["self_attn"]["__call__"][0][0][0],
        "layer": layers["__call__"][0][0][0],
        "logits": logits,
    }
    return {k: np.asarray(v.astype(jnp.float32)) for k, v in rungs.items()}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(generate.FILE) as file:
        return dict(file)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", models.CASES.keys())
def test_every_rung_equals_the_golden_file(tmp_path, name):
    raw = models.CASES[name]
    folder = models.write_hf(tmp_path / "model", raw)
    # More rows than the file has, so that all tests share one compiled program.
    tokens = models.tokens(raw, batch=ROWS)
    np.testing.assert_array_equal(tokens[:1], models.tokens(raw, batch=1))
    ours = our_ladder(folder, tokens)
    for rung in RUNGS:
        first = ours[rung] if rung.startswith("rope") else ours[rung][:1]
        assert relative_error(first, golden()[f"{name}/{rung}"]) < 1e-5, rung


@needs_torch
@every_family
def test_every_rung_equals_transformers(tmp_path, raw):
    folder = models.write_hf(tmp_path / "model", raw)
    tokens = models.tokens(raw, batch=ROWS)
    theirs = generate.transformers_ladder(folder, tokens)
    ours = our_ladder(folder, tokens)
    for rung in RUNGS:
        assert relative_error(ours[rung], theirs[rung]) < 1e-5, rung


@pytest.mark.one_in(3)
@needs_torch
@pytest.mark.parametrize("name", models.BY_ROPE)
def test_bfloat16_errs_no_more_than_transformers_does(tmp_path, name):
    """Against the same rounded weights in float32, both bfloat16 models' logits are off a bit."""
    raw = models.CASES[name]
    folder = models.write_hf(tmp_path / "model", raw, dtype="bfloat16")
    tokens = models.tokens(raw, batch=ROWS)
    truth = our_ladder(folder, tokens, dtype=jnp.float32)["logits"]
    ours = our_ladder(folder, tokens)["logits"]
    theirs = generate.transformers_ladder(folder, tokens)["logits"]
    our_error = np.sqrt(np.mean((ours - truth) ** 2))
    their_error = np.sqrt(np.mean((theirs - truth) ** 2))
    assert our_error <= 1.05 * their_error


def test_padding_to_the_right_changes_nothing_before_it(tmp_path):
    raw = models.CASES["llama, dynamic rope"]
    folder = models.write_hf(tmp_path / "model", raw)
    config, params = pretrained.load_config(folder), pretrained.load_params(folder)
    tokens = jnp.asarray(models.tokens(raw))
    padded = jnp.pad(tokens, ((0, 0), (0, 19)))
    hidden_states = jax.jit(llama.hidden_states, static_argnums=0, static_argnames="total_length")
    plain, _ = hidden_states(config, params, tokens)
    longer, _ = hidden_states(config, params, padded, total_length=tokens.shape[1])
    np.testing.assert_allclose(longer[:, : tokens.shape[1]], plain, atol=1e-5)
