"""Gates under a budget: the mean is exact, gates run apart, the objective decides which way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_answers import batch, divergence, divergence_and_gradient, model
from train import budget
from train.loss import StepConfig

CONFIG = StepConfig(
    num_steps=20,
    learning_rate=1.0,
    reg_weight=0.0,
    target_sparsity=0.5,
    sink_size=3,
    recent_size=9,
    mixing="self",
    tail_size=24,
    objective="divergence",
)


step = jax.jit(budget.train_step, static_argnames=("architecture", "step"))


def train(data, config: StepConfig = CONFIG, *, steps: int):
    """Return the states and metrics after each step."""
    architecture, params = model()
    state, states, metrics = budget.init_state(architecture, config), [], []
    for _ in range(steps):
        state, values = step(state, params, data, architecture=architecture, step=config)
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics


@functools.cache
def trained():
    return train(batch(), steps=CONFIG.num_steps)


@pytest.mark.parametrize("mean", [0.001, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
def test_the_mean_is_the_budget_and_the_order_that_of_the_scores(mean, spread):
    """With scores far apart, gates are 0 and 1, and the mean of 1,000 is within one of them."""
    scores = spread * np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    gates = np.asarray(jax.jit(budget.gates_of)(jnp.asarray(scores), jnp.float32(mean)))
    np.testing.assert_allclose(gates.mean(), mean, atol=1e-3 if spread > 100 else 1e-5)
    order = np.argsort(scores, axis=None)
    assert (np.diff(gates.ravel()[order]) >= 0).all()


@pytest.mark.slow
def test_the_budget_falls_and_holds():
    states, metrics = trained()
    expected = 1 - 0.5 * np.minimum(np.arange(1, 21) / 12, 1)
    np.testing.assert_allclose([m["mean_gate"] for m in metrics], expected, rtol=1e-5)
    assert [int(s.step) for s in states] == list(range(1, 21))


def test_the_first_steps_are_the_formula():
    """By hand: two steps, with the running mean corrected for its start at 0."""
    states, metrics = trained()
    scores, scale = jnp.zeros((2, 2)), 0.0
    for number in range(2):
        gates = budget.gates_of(scores, jnp.float32(1 - 0.5 * (number + 1) / 12))
        value, gradient = divergence_and_gradient(gates, batch())
        np.testing.assert_allclose(metrics[number]["divergence"], value, rtol=1e-4)
        scale = 0.8 * scale + 0.2 * float(np.sqrt(np.mean(gradient**2)))
        scores = scores - gradient / (scale / (1 - 0.8 ** (number + 1)))
        np.testing.assert_allclose(states[number].scores, scores, rtol=1e-3, atol=1e-4)


def test_the_heads_that_are_kept_are_the_best_pair():
    """Of all six pairs of four heads, the divergence of the answers is least with these."""
    gates = budget.pattern_gates(trained()[0][-1].scores, CONFIG)
    kept = np.zeros(4, bool)
    kept[np.argsort(-gates, axis=None)[:2]] = True
    pairs = [p for p in np.ndindex(2, 2, 2, 2) if sum(p) == 2]
    values = {p: float(divergence(jnp.array(p, jnp.float32).reshape(2, 2), batch())) for p in pairs}
    assert min(values, key=values.__getitem__) == tuple(int(k) for k in kept)


def test_a_pattern_keeps_the_choice_and_the_whole_ranking():
    """Scores far apart: the gates themselves are 0 and 1, and cannot tell the upper four apart."""
    scores = jnp.array([[1000.0, 900, 700, 600], [-1, -2, -300, -700]])
    gates = budget.pattern_gates(scores, CONFIG)
    np.testing.assert_array_equal(gates > 0.5, scores > 0)
    assert (np.diff(gates.ravel()) < 0).all()
    assert len(np.unique(budget.gates_of(scores, jnp.float32(0.5)))) < 8


def test_rate_and_target_decide(monkeypatch):
    """On an objective that compiles at once, since it is the optimiser that counts."""
    worth = jnp.array([[0.1, 0.4], [0.2, 0.3]])
    monkeypatch.setattr(budget, "objective", lambda gates, *_, **__: jnp.sum(worth * gates**3))

    def scores(**changes):
        config = dataclasses.replace(CONFIG, num_steps=10, **changes)  # a program of its own
        return train(batch(), config, steps=3)[0][-1].scores

    for change in ({"learning_rate": 0.1}, {"target_sparsity": 0.25}):
        assert np.abs(scores(**change) - scores()).max() > 1e-3


@pytest.mark.slow
def test_a_text_in_which_nothing_is_far_teaches_nothing():
    """Its 12 tokens are all within the sink or the recent ones of every other."""
    answers = np.zeros((2, 64), bool)
    answers[:, [5, 9, 11]] = True
    short = dataclasses.replace(
        batch(),
        tail_start=jnp.array([2, 4]),
        total_length=jnp.array([12, 12]),
        answers=jnp.asarray(answers),
    )
    (_, state), _ = train(short, steps=2)
    np.testing.assert_allclose(state.scores, 0, atol=0.1)
    (_, far), _ = train(batch(), steps=2)
    assert np.abs(far.scores).max() > 0.5
