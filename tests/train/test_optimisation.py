"""The optimiser of the gates: schedule, first update, bounds, and the sparsity controller."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model.hf_config import parse_config
from tests import models
from tests.params import random_params
from train import loss, optimisation
from train.distillation import Batch
from train.optimisation import StepConfig, init_state, train_step

MODEL = parse_config(models.llama(num_hidden_layers=2))
PARAMS, BFLOAT16 = (random_params(MODEL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
CONFIG = StepConfig(
    num_steps=100,
    learning_rate=0.02,
    reg_weight=0.05,
    target_sparsity=None,
    sink_size=2,
    recent_size=6,
    mixing="teacher",
    tail_size=16,
)


TARGETED = dataclasses.replace(CONFIG, num_steps=150, target_sparsity=0.5)


def batch(index: int = 0, *, length: int = 48) -> Batch:
    tokens = np.random.default_rng([3, index]).integers(0, 96, (1, length), np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.array([length - 14]),
        total_length=jnp.array([length - 2]),
    )


def pull_up(gates, *_, **__):
    """Pull gates to 1, as distillation does."""
    return jnp.mean(jnp.square(1 - gates))


def pull_unevenly(gates, _, data, **__):
    """Pull each gate to 1 as hard as the step's text says."""
    return jnp.mean(data.tokens[0, :4].reshape(2, 2).astype(gates.dtype) * (1 - gates) ** 2) / 96


@functools.cache
def compiled(config: StepConfig, objective):
    del objective  # programs differ by it
    step = functools.partial(train_step, architecture=MODEL, step=config)
    return jax.jit(step)


def train(config: StepConfig, *, steps: int, weights=None, objective=None):
    """Return the states and metrics after each step.

    An `objective` takes the place of the model's, where only the optimiser counts: that compiles
    at once.
    """
    state, step = init_state(MODEL, config), compiled(config, objective)
    states, metrics = [], []
    with pytest.MonkeyPatch.context() as patch:
        if objective is not None:
            patch.setattr("train.loss.objective", objective)
        for index in range(steps):
            state, values = step(state, weights or PARAMS, batch(index))
            states.append(state)
            metrics.append({k: float(v) for k, v in values.items()})
    return states, metrics


def specified_factor(step: int, num_steps: int) -> float:
    """SPEC section 2, as it stands there; w = 0 makes the ramps infinitely steep."""
    w = num_steps // 5
    rise, fall = ((step + 1) / w, (num_steps - step) / w) if w else (np.inf, np.inf)
    return min(1, max(rise, 0.1), max(fall, 0.1))


@pytest.mark.parametrize("num_steps", [1, 4, 5, 10, 2000])
def test_learning_rate_is_the_specified_one_at_every_step(num_steps):
    config = dataclasses.replace(CONFIG, num_steps=num_steps)
    rate = jax.vmap(functools.partial(optimisation.learning_rate, config))
    expected = [0.02 * specified_factor(step, num_steps) for step in range(num_steps)]
    np.testing.assert_allclose(rate(jnp.arange(num_steps)), expected, rtol=1e-6)


def test_the_step_uses_that_rate():
    """A constant gradient makes every AdamW update as long as the learning rate."""
    config = dataclasses.replace(CONFIG, num_steps=20)
    states, metrics = train(config, steps=20, objective=lambda gates, *_, **__: 0 * gates.sum())
    gates = np.array([1.0, *(float(state.gates[0, 0]) for state in states)])
    expected = [0.02 * specified_factor(step, 20) for step in range(20)]
    np.testing.assert_allclose(-np.diff(gates), expected, rtol=1e-3)
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], expected, rtol=1e-6)


def test_gates_start_at_one_in_float32():
    state = init_state(MODEL, CONFIG)
    assert state.gates.shape == (2, 2)
    assert state.gates.dtype == jnp.float32
    np.testing.assert_array_equal(state.gates, 1.0)
    assert int(state.step) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_first_update_is_adamws_from_the_penalty_alone(mixing):
    """With all gates 1 the student is the teacher, so only reg_weight / n pulls.

    The first update only: tests/train/test_distillation.py sees both mixings at other gates.
    """
    config = dataclasses.replace(CONFIG, mixing=mixing)
    (state,), (metrics,) = train(config, steps=1, weights=BFLOAT16)
    gradient = 0.05 / 4
    first = (1 - 0.9) * gradient / (1 - 0.9)  # moments, bias-corrected
    second = (1 - 0.999) * gradient**2 / (1 - 0.999)
    expected = 1.0 - 0.02 * 0.1 * first / (np.sqrt(second) + 1e-8)
    np.testing.assert_allclose(state.gates, expected, rtol=1e-6)
    assert metrics["distillation"] == 0.0
    np.testing.assert_allclose(metrics["penalty"], 0.05, rtol=1e-6)
    assert int(state.step) == 1


def test_later_updates_are_adamws_too():
    """By hand, over enough different gradients for both moments to matter."""
    config = dataclasses.replace(CONFIG, learning_rate=0.05, num_steps=30)
    states, _ = train(config, steps=16, objective=pull_unevenly)
    gates = np.ones((2, 2))
    first = second = np.zeros((2, 2))
    for step in range(16):
        weights = np.asarray(batch(step).tokens[0, :4]).reshape(2, 2) / 96
        gradient = 2 * weights * (gates - 1) / 4 + 0.05 / 4
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        rate = 0.05 * specified_factor(step, 30)
        gates = np.clip(gates - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8), 0, 1)
        np.testing.assert_allclose(states[step].gates, gates, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, TARGETED], ids=["penalty", "target"])
def test_metrics_add_up(config):
    states, metrics = train(config, steps=4, objective=pull_up)
    for state, values in zip(states, metrics, strict=True):
        above_half = float((state.gates > 0.5).mean())
        np.testing.assert_allclose(values["gates_above_half"], above_half, rtol=1e-6)
        np.testing.assert_allclose(
            values["loss"], values["distillation"] + values["penalty"], rtol=1e-6
        )
        np.testing.assert_allclose(values["mean_gate"], state.gates.mean(), rtol=1e-6)
    if config.target_sparsity is None:
        before = [1.0, *(float(s.gates.mean()) for s in states[:-1])]
        np.testing.assert_allclose([m["penalty"] for m in metrics], 0.05 * np.array(before), 1e-5)


def test_gates_stay_between_0_and_1():
    """Steps of 0.9 overshoot both ends: the objective pulls up, a heavy penalty pulls down."""
    config = dataclasses.replace(CONFIG, learning_rate=0.9, num_steps=12)
    gates = np.array([state.gates for state in train(config, steps=12, objective=pull_up)[0]])
    assert (gates[0] < 1).all()
    assert gates[1:].max() == 1.0
    heavy = dataclasses.replace(config, reg_weight=50.0)
    gates = np.array([state.gates for state in train(heavy, steps=3, objective=pull_up)[0]])
    np.testing.assert_array_equal(gates[-1], 0.0)


@pytest.mark.slow
def test_target_sparsity_brings_the_mean_gate_to_the_target_and_holds_it():
    states, metrics = train(TARGETED, steps=TARGETED.num_steps)
    means = np.array([m["mean_gate"] for m in metrics])
    assert abs(means[-1] - 0.5) < 0.05
    assert np.abs(means[100:] - 0.5).max() < 0.1  # no swinging about
    # By distillation, not by pulling all gates down alike.
    assert states[-1].gates.max() - states[-1].gates.min() > 0.5


@pytest.mark.slow
def test_bfloat16_weights_keep_gates_and_optimiser_in_float32():
    states, metrics = train(CONFIG, steps=3, weights=BFLOAT16)
    for leaf in jax.tree.leaves(states[-1]):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    gates = np.unique(np.asarray(states[-1].gates))
    assert (gates.astype(jnp.bfloat16).astype(np.float32) != gates).any()
    assert metrics[-1]["distillation"] > 0


CHANGES = {
    "num_steps": 10,
    "learning_rate": 0.05,
    "reg_weight": 2.0,
    "target_sparsity": 0.9,
    "sink_size": 0,
    "recent_size": 3,
    "mixing": "self",
    "tail_size": 8,  # cuts supervised positions off
    "objective": "cross_entropy",
}


OPTIMISER_S = ("num_steps", "learning_rate", "reg_weight", "target_sparsity")


@pytest.mark.parametrize(
    "field",
    [pytest.param(x, marks=[pytest.mark.slow] * (x not in OPTIMISER_S)) for x in CHANGES],
)
def test_every_setting_changes_the_gates(field):
    objective = pull_up if field in OPTIMISER_S else None
    changed = dataclasses.replace(CONFIG, **{field: CHANGES[field]})
    before, after = (
        train(config, steps=4, objective=objective)[0][-1].gates for config in (CONFIG, changed)
    )
    assert np.abs(before - after).max() > 1e-6


@pytest.mark.parametrize("field", [x for x in CHANGES if x not in OPTIMISER_S])
def test_the_objective_is_given_the_other_settings(monkeypatch, field):
    """The tests of distillation and of language modelling see that they obey these."""

    def given(config: StepConfig) -> tuple:
        calls = []
        for name in ("distillation_loss", "language_modelling_loss"):

            def record(*_, name=name, **options):
                calls.append((name, options))
                return jnp.float32(0)

            monkeypatch.setattr(loss, name, record)
        loss.objective(jnp.ones((2, 2)), {}, batch(), architecture=MODEL, step=config)
        [(name, options)] = calls
        return name, options

    (name, before), (other, after) = (
        given(config) for config in (CONFIG, dataclasses.replace(CONFIG, **{field: CHANGES[field]}))
    )
    if field == "objective":
        assert (name, other) == ("distillation_loss", "language_modelling_loss")
    else:
        assert name == other
        assert before | {field: CHANGES[field]} == after != before


def test_no_setting_is_left_out():
    fields = {field.name for field in dataclasses.fields(StepConfig)}
    # tests/duo_jax/serve/test_implementations.py sees that the choice of implementation is obeyed,
    # tests/train/test_attribution.py that votes are.
    assert fields - CHANGES.keys() == {"implementation", "votes"}
