"""Masks at a target: the gradient, the multipliers, the random numbers, and whether they hit it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model.hf_config import parse_config
from tests import models
from tests.train.test_answers import batch, model
from train import hard_concrete, masks
from train.distillation import Batch
from train.loss import StepConfig

WIDE = parse_config(
    models.llama(num_hidden_layers=30, num_attention_heads=3, num_key_value_heads=3, head_dim=8)
)

CONFIG = StepConfig(
    num_steps=20,
    learning_rate=0.1,
    reg_weight=0.0,
    target_sparsity=0.5,
    sink_size=3,
    recent_size=9,
    mixing="self",
    tail_size=24,
    objective="cross_entropy",
)


@functools.cache
def step_of(config: StepConfig):
    return jax.jit(functools.partial(masks.train_step, architecture=model()[0], step=config))


def trained(steps, *, state=None):
    """Return the states, the first one included, and the metrics after each step."""
    state = state or masks.init_state(model()[0], CONFIG, seed=0)
    states, metrics = [state], []
    for _ in range(steps):
        state, values = step_of(CONFIG)(state, model()[1], batch())
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics


def test_all_heads_are_kept_at_the_start_and_the_seed_decides_the_rest():
    first, again, other = (masks.init_state(model()[0], CONFIG, seed=s) for s in (0, 0, 1))
    for state in (first, other):
        np.testing.assert_allclose(state.log_alpha, 4.5, atol=0.05)
    np.testing.assert_array_equal(first.log_alpha, again.log_alpha)
    assert (first.log_alpha != other.log_alpha).all()
    assert (first.key != other.key).any()
    largest = masks.init_state(model()[0], CONFIG, seed=2**32 - 1)
    assert (largest.key != first.key).any()


def test_a_warm_start_gives_the_lowest_heads_the_lowest_log_alpha():
    gates = np.array([[0.9, 0.1], [0.2, 0.8]])
    state = masks.init_state(model()[0], CONFIG, seed=0, gates=gates)
    np.testing.assert_array_equal(
        np.argsort(state.log_alpha, axis=None), np.argsort(gates, axis=None)
    )
    assert float(hard_concrete.probability_of_zero(state.log_alpha).max()) < 0.04


def _uneven(gates, *_, **__):
    """Stand in for a model, whose gradient test_language_modelling.py has."""
    return jnp.sum(jnp.sin(jnp.array([[1.0, 2.0], [3.0, 4.0]], gates.dtype) * gates) ** 2)


def test_gradient_equals_central_differences_in_float64(monkeypatch):
    """Of log_alpha, through a mask that is neither 0 nor 1, and of both multipliers."""
    monkeypatch.setattr(masks, "objective", _uneven)
    with jax.enable_x64(True):
        start = dataclasses.replace(masks.init_state(model()[0], CONFIG, seed=0), step=jnp.int32(5))
        log_alpha = jnp.array([[0.5, -0.3], [0.2, -0.1]], jnp.float64)
        multipliers = jnp.array([-0.3, 0.7], jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def lagrangian(variables):
            options = {"architecture": model()[0], "step": CONFIG}
            return masks.loss(variables, start, {}, batch(), **options)[0]

        gradient, ascent = lagrangian((log_alpha, multipliers))[1]
        key = jax.random.fold_in(jax.random.wrap_key_data(start.key), 5)
        drawn = np.asarray(hard_concrete.sample(key, log_alpha))
        assert ((drawn > 0.01) & (drawn < 0.99)).any()
        for index in np.ndindex(2, 2):
            nudge = jnp.zeros((2, 2), jnp.float64).at[index].set(1e-5)
            above, below = (lagrangian((log_alpha + n, multipliers))[0] for n in (nudge, -nudge))
            np.testing.assert_allclose(gradient[index], (above - below) / 2e-5, rtol=1e-5)
        excess = float(hard_concrete.probability_of_zero(log_alpha).mean()) - 0.5 * 5 / 16
        np.testing.assert_allclose(ascent, [excess, excess**2], rtol=1e-6)


@pytest.mark.slow
def test_multipliers_ascend():
    """Below the target l1 falls, so that its term rises; above it l1 rises; l2 always rises."""
    states, metrics = trained(8)
    sparsity = [float(hard_concrete.probability_of_zero(s.log_alpha).mean()) for s in states]
    targets = [m["target"] for m in metrics]
    np.testing.assert_allclose(targets, 0.5 * np.arange(8) / 16, rtol=1e-6)
    assert all(s < t for s, t in zip(sparsity[3:], targets[3:], strict=False))
    l1, l2 = np.array([s.multipliers for s in states]).T
    assert (np.diff(l1)[3:] < 0).all()
    assert (np.diff(l2) > 0).all()
    low = dataclasses.replace(states[0], log_alpha=states[0].log_alpha - 9)
    l1, l2 = np.array([s.multipliers for s in trained(3, state=low)[0]]).T
    assert (np.diff(l1) > 0).all()
    assert (np.diff(l2) > 0).all()


@pytest.mark.slow
def test_the_random_numbers_are_those_of_seed_and_step():
    states, metrics = trained(3)
    assert trained(3)[1] == metrics
    assert trained(1, state=states[2])[1] == metrics[2:]  # what came before does not matter
    shown = []
    for change in ({}, {"step": jnp.int32(1)}, {"key": states[0].key + 1}):
        undecided = dataclasses.replace(states[0], log_alpha=jnp.zeros((2, 2)), **change)
        shown.append(trained(1, state=undecided)[1][0]["cross_entropy"])
    assert len(set(shown)) == 3


def test_masks_that_are_still_moving_say_so(capsys):
    """The pattern keeps the target's number in any case, and the order of log_alpha."""
    log_alpha = jnp.array([[9.0, -2.0], [3.0, -9.0]])
    gates = masks.pattern_gates(log_alpha, CONFIG)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(gates > 0.5, [[True, False], [True, False]])
    gates = masks.pattern_gates(jnp.array([[9.0, 4.0], [7.0, 8.0]]), CONFIG)
    assert "the masks ended with 0.0 streaming heads, where the target is 2.0" in (
        capsys.readouterr().err
    )
    np.testing.assert_array_equal(gates > 0.5, [[True, False], [False, True]])


@functools.partial(jax.jit, static_argnames="config")
def _whole_run(state, worth, config):
    zero = jnp.zeros(1, jnp.int32)

    def step(state, index):
        data = Batch(tokens=index[None, None], tail_start=zero, total_length=zero)
        return masks.train_step(state, {"worth": worth}, data, architecture=WIDE, step=config)

    return jax.lax.scan(step, state, jnp.arange(config.num_steps))


def _made_up(gates, params, batch, *, architecture, step):
    """Stand in for a model: a head that streams costs what it is worth to this step's text."""
    del architecture, step
    worth = params["worth"]
    noise = 1 + 0.5 * jax.random.normal(jax.random.key(batch.tokens[0, 0]), worth.shape)
    lost = jnp.sum(worth * noise * (1 - gates))
    return 2 + lost + 0.3 * jnp.square(lost)


@pytest.mark.parametrize("target", [0.5, 0.75, 0.9])
def test_a_run_of_the_default_length_hits_the_target_with_the_heads_that_are_worth_most(
    monkeypatch, target
):
    """90 heads, of which few are worth much; 1,000 steps."""
    monkeypatch.setattr(masks, "objective", _made_up)
    worth = np.random.default_rng(1).pareto(1.0, (30, 3))
    worth = jnp.asarray(worth / worth.sum(), jnp.float32)
    config = dataclasses.replace(CONFIG, num_steps=1000, target_sparsity=target)
    state, _ = _whole_run(masks.init_state(WIDE, config, seed=0), worth, config)
    zeros = float(hard_concrete.probability_of_zero(state.log_alpha).sum())
    assert abs(zeros - 90 * target) <= 1
    chosen = masks.pattern_gates(state.log_alpha, config) > 0.5
    assert chosen.sum() == round(90 * (1 - target))
    best = np.sort(np.asarray(worth), axis=None)[-chosen.sum() :].sum()
    assert np.asarray(worth)[chosen].sum() > 0.97 * best
