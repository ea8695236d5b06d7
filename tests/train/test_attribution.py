"""Credits of heads: they sum up to what the answers lose, and the demo's heads have the most."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeySampler
from duo_jax.heads.pattern import load_pattern
from tests.train.test_answers import batch, divergence_and_gradient, log_p, model
from train import attribution
from train.identify import training
from train.identify.batches import batch_of_one
from train.identify.flags import default_config
from train.loss import StepConfig, objective

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = StepConfig(
    num_steps=12,
    learning_rate=0.0,
    reg_weight=0.0,
    target_sparsity=0.75,
    sink_size=3,
    recent_size=9,
    mixing="self",
    tail_size=24,
    objective="cross_entropy",
)


@functools.cache
def attributed(**changes):
    """Return the credits of one text, and the metrics of each step."""
    architecture, params = model()
    options = {"architecture": architecture, "step": dataclasses.replace(CONFIG, **changes)}
    step = jax.jit(functools.partial(attribution.train_step, **options))
    state, metrics = attribution.init_state(architecture), []
    for _ in range(CONFIG.num_steps):
        state, values = step(state, params, batch())
        metrics.append({name: float(value) for name, value in values.items()})
    assert int(state.step) == CONFIG.num_steps
    return np.asarray(state.credit), metrics


def answer_nll(gate: float) -> float:
    """Look the answers' probabilities up, one by one."""
    data = batch()
    probabilities = np.asarray(log_p(model()[1], jnp.full((2, 2), gate), data.tokens))
    at = np.nonzero(np.asarray(data.answers))
    return float(-np.mean([probabilities[r, i - 1, data.tokens[r, i]] for r, i in zip(*at)]))  # noqa: B905


@pytest.mark.slow
def test_credits_sum_up_to_what_the_answers_lose_along_the_path():
    """Integrated gradients are complete; the middle of 12 parts is a good integral."""
    credit, metrics = attributed()
    lost = answer_nll(0.25) - answer_nll(1.0)
    assert abs(lost) > 0.01
    np.testing.assert_allclose(credit.sum(), lost, rtol=0.02)
    nlls = [m["cross_entropy"] for m in metrics]
    np.testing.assert_allclose(nlls, [answer_nll(m["mean_gate"]) for m in metrics], rtol=1e-4)


@pytest.mark.slow
def test_credits_of_the_divergence_sum_up_to_it_at_the_end():
    """It is 0 where all gates are 1."""
    credit, metrics = attributed(objective="divergence")
    lost = float(divergence_and_gradient(jnp.full((2, 2), 0.25), batch())[0])
    assert lost > 0.01
    np.testing.assert_allclose(credit.sum(), lost, rtol=0.02)
    assert "cross_entropy" not in metrics[0]
    assert metrics[0]["divergence"] < metrics[-1]["divergence"] < lost


@pytest.mark.slow
def test_equal_votes_are_shares_of_each_texts_gradients():
    """Of one text, too, the places on the path count alike, whatever is lost there."""
    credit, _ = attributed(votes="equal")
    architecture, params = model()

    def nll(gates):
        return objective(gates, params, batch(), architecture=architecture, step=CONFIG)

    expected = np.zeros_like(credit)
    for number in range(CONFIG.num_steps):
        at, length = attribution.part_of_path(CONFIG, jnp.int32(number))
        gradient = np.asarray(jax.grad(nll)(jnp.full((2, 2), at)))
        expected -= length * gradient / np.abs(gradient).sum()
    np.testing.assert_allclose(credit, expected, rtol=1e-4)
    assert not np.allclose(credit, attributed()[0], rtol=0.1)


def test_rounding_has_no_vote():
    """Where a streaming head sees all that a full one does, no gate counts."""
    architecture, params = model()
    step = dataclasses.replace(CONFIG, sink_size=200, votes="equal")  # of a text of 24 tokens
    update = jax.jit(
        functools.partial(attribution.train_step, architecture=architecture, step=step)
    )
    state, _ = update(attribution.init_state(architecture), params, batch())
    assert np.abs(state.credit).max() < 1e-3


@pytest.mark.parametrize(("target", "end"), [(0.75, 0.25), (1.0, 0.0)])
def test_the_path_falls_from_one_to_the_mean_gate_of_the_target(target, end):
    config = dataclasses.replace(CONFIG, target_sparsity=target)
    parts = [attribution.part_of_path(config, jnp.int32(number)) for number in range(12)]
    middles, lengths = np.array(parts).T
    np.testing.assert_allclose(middles + lengths / 2, np.linspace(1, end, 12, endpoint=False), 1e-5)
    np.testing.assert_allclose(lengths.sum(), 1 - end, rtol=1e-6)


def test_a_pattern_keeps_the_target_in_the_order_of_credit():
    credit = jnp.array([[0.3, -2.0], [1e-6, 5.0]])
    gates = attribution.pattern_gates(credit, CONFIG)
    np.testing.assert_array_equal(gates > 0.5, [[False, False], [False, True]])
    np.testing.assert_array_equal(np.argsort(gates, axis=None), [1, 2, 0, 3])


@pytest.mark.slow
def test_the_demo_models_retrieval_heads_have_the_most_credit():
    """The four that training found are among five of 16; at random that is 1 case in 364."""
    folder = pretrained.resolve(pretrained.DEMO)
    architecture = pretrained.load_config(folder)
    params = pretrained.load_params(folder, dtype=np.float32)
    flags = default_config("demo", folder)
    short = dataclasses.replace(flags.data, max_length=320)
    flags = dataclasses.replace(flags, method="attribute", num_steps=5, data=short)
    text, _ = split_held_out(load_documents(()))
    sampler = PasskeySampler(short, pretrained.load_tokenizer(folder), text[:4], seed=0)
    step = training.step_config(flags, tail_size=200)
    update = jax.jit(
        functools.partial(attribution.train_step, architecture=architecture, step=step)
    )
    state = attribution.init_state(architecture)
    for index in range(5):
        sample = training.sample_of_step(flags, sampler, index)
        state, _ = update(state, params, batch_of_one(sample, 320))
    gates = load_pattern(ROOT / "docs/demo/pattern").gates
    best = np.argsort(-np.asarray(state.credit), axis=None)[:5]
    assert (gates > 0.5).sum() == 4
    assert set(np.flatnonzero(gates > 0.5)) <= set(best)
