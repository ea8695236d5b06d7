"""Serving and gate training on the kernels, run by Pallas' interpreter, against XLA's versions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.cache import init_cache
from duo_jax.errors import InputError
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.serve import decoding, prefill, sampling
from duo_jax.session.runtime import Runtime
from tests import models
from tests.params import random_params
from train.distillation import Batch
from train.optimisation import StepConfig, init_state, train_step

RAW = models.llama(num_key_value_heads=4, num_attention_heads=8, num_hidden_layers=2)
CONFIG = parse_config(RAW)  # trained
SERVED = dataclasses.replace(CONFIG, num_layers=1)
HEADS = np.array([[0, 1, 0, 1]], bool)
SPLIT = duo_config(SERVED, HEADS, sink_size=4, recent_size=6)
LENGTHS = np.array([29, 3], np.int32)  # across the ring's wrap-around, and before it


@functools.cache
def weights():
    return split_params(SERVED, random_params(SERVED), HEADS)


@functools.cache
def written(implementation: str, mode: str):
    """Read two ragged prompts in chunks of 16, write 12 tokens each; return them and the logits."""
    tokens = jnp.asarray(models.tokens(RAW, batch=2, length=32))
    cache = init_cache(SPLIT, batch_size=2, max_len=48)
    read = jax.jit(prefill, static_argnames=("config", "mode", "implementation"))
    logits = []
    for first in (0, 16):
        num = jnp.asarray(np.clip(LENGTHS - first, 0, 16))
        part, cache = read(
            SPLIT,
            weights(),
            cache,
            tokens[:, first : first + 16],
            num,
            mode=mode,
            implementation=implementation,
        )
        logits.append(jnp.where(num[:, None] > 0, part, 0.0))
    last = jnp.where(LENGTHS[:, None] > 16, logits[1], logits[0])
    options = sampling.SamplingConfig().options()
    stops = jnp.zeros(0, jnp.int32)
    state = decoding.begin(cache, last, decoding.row_rng_keys(0, 2), None, options, stops)
    _, new, _ = decoding.decode_segment(
        SPLIT,
        weights(),
        state,
        options,
        stops,
        jnp.array([12, 12], jnp.int32),
        size=12,
        implementation=implementation,
    )
    return np.asarray(last), np.asarray(new)


# tests/kernels compares what the modes call; a chunk seen whole needs fewer of its masks.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "chunk"])
def test_serving_writes_the_same_greedy_tokens(mode):
    logits, tokens = written("interpret", mode)
    expected_logits, expected_tokens = written("xla", mode)
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5)
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert len(np.unique(tokens)) > 4  # not one token over and over


def step_of(implementation: str, mixing: str) -> StepConfig:
    return StepConfig(
        num_steps=10,
        learning_rate=0.1,
        reg_weight=0.05,
        target_sparsity=None,
        sink_size=3,
        recent_size=9,
        mixing=mixing,
        tail_size=24,
        implementation=implementation,
    )


def batch_of(seed: int) -> Batch:
    return Batch(
        tokens=jnp.asarray(models.tokens(RAW, batch=1, length=48, seed=seed)),
        tail_start=jnp.array([26]),
        total_length=jnp.array([46]),
    )


def trained(implementation: str, mixing: str):
    """Return the gates after three steps of identification."""
    step = step_of(implementation, mixing)
    run = jax.jit(functools.partial(train_step, architecture=CONFIG, step=step))
    state = init_state(CONFIG, step)
    for seed in range(3):
        state, metrics = run(state, random_params(CONFIG), batch_of(seed))
    return np.asarray(state.gates), float(metrics["distillation"])


@pytest.mark.slow  # tests/kernels compares the gradients of every kernel with float64
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_identification_learns_the_same_gates(mixing):
    gates, loss = trained("interpret", mixing)
    expected, expected_loss = trained("xla", mixing)
    np.testing.assert_allclose(gates, expected, atol=1e-3)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert gates.min() < 0.98  # three steps moved them


def test_the_runtime_passes_its_choice_on():
    runtime = Runtime(config=SPLIT, params=weights())
    assert runtime.implementation == "auto"
    with pytest.raises(InputError, match="'fast' is not one of auto, xla, triton, interpret"):
        dataclasses.replace(runtime, implementation="fast")
    with pytest.raises(
        InputError, match="'triton' needs an NVIDIA GPU, and this process runs on cpu"
    ):
        dataclasses.replace(runtime, implementation="triton")


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """Run XLA's version of every operation; return the list of those that were asked for."""
    found = []

    def spy(implementation, **branches):
        found.append(implementation)
        return branches["xla"]()

    for module in ("decode", "full", "prefill", "streaming"):
        monkeypatch.setattr(f"kernels.{module}.api.dispatch", spy)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_identification_with_a_choice_uses_it(used, mixing):
    step = step_of("interpret", mixing)
    run = functools.partial(train_step, architecture=CONFIG, step=step)
    arguments = init_state(CONFIG, step), random_params(CONFIG), batch_of(0)
    used.clear()  # parameters are made by tracing the plain model
    jax.eval_shape(run, *arguments)
    assert set(used) == {"interpret"}
    assert len(used) >= 2  # of retrieval and of streaming heads


@pytest.mark.slow
def test_loading_with_a_choice_uses_it(tmp_path, used):
    import duo_jax

    folder = models.write_hf(tmp_path / "tiny", RAW | {"vocab_size": 400, "num_hidden_layers": 1})
    models.write_tokenizer(folder, vocab_size=400)
    model = duo_jax.load(folder, pattern="none", implementation="interpret")
    model.generate(["some words of a prompt"], max_new_tokens=2)
    assert set(used) == {"interpret"}
