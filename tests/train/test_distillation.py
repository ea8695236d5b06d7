"""Gate mixing and the distillation loss: what must hold exactly, and the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from kernels import full_attention, streaming_attention
from tests import models
from tests.params import random_params
from train import gates as gated
from train.distillation import Batch, distillation_loss, tail_of, tail_positions

pytestmark = pytest.mark.core

SIZES = {"sink_size": 3, "recent_size": 9}
LENGTH, TAIL = 64, 24


@functools.cache
def model(name="llama-3, grouped queries"):
    config = parse_config(models.CASES[name])
    return config, random_params(config)


def batch(rows: int = 1, total: int = 60) -> Batch:
    tokens = np.random.default_rng(1).integers(0, 96, (rows, LENGTH), np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        tail_start=jnp.full(rows, total - 20),
        total_length=jnp.full(rows, total),
    )


@functools.partial(jax.jit, static_argnames="mixing")
def _loss(gates, params, data, mixing):
    return distillation_loss(
        gates, model()[0], params, data, mixing=mixing, tail_size=TAIL, **SIZES
    )


def loss(gates, mixing="teacher", data=None, params=None):
    return _loss(gates, params or model()[1], data or batch(), mixing)


def some_gates(seed=2):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.9, (2, 2)), jnp.float32)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_all_gates_one_is_the_teacher_exactly(mixing):
    assert loss(jnp.ones((2, 2)), mixing) == 0.0
    assert loss(some_gates(), mixing) > 0.0


@functools.cache
def loss_of_streaming() -> jax.Array:
    config, params = model()
    data = batch()

    def streaming(q, k, v, _):
        out, _ = streaming_attention(q, k, v, softmax_scale=q.shape[-1] ** -0.5, **SIZES)
        return out, None

    @functools.partial(jax.jit, static_argnums=0)
    def final(attend):
        x, _ = llama.hidden_states(config, params, data.tokens, attend=attend)
        return llama.final_norm(config, params, x)[:, 40:60]

    return jnp.mean(jnp.square(final(streaming) - final(llama.attend_full)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mixing", ["teacher", "self"])
def test_all_gates_zero_is_pure_streaming(mixing):
    np.testing.assert_allclose(loss(jnp.zeros((2, 2)), mixing), loss_of_streaming(), rtol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("attention", [gated.self_mixed_attention, gated.chosen_attention])
def test_binary_gates_mask_head_by_head(attention):
    config, _ = model()
    shape = (1, 40, config.num_q_heads, config.head_dim)
    q = jax.random.normal(jax.random.key(1), shape)
    k = jax.random.normal(jax.random.key(2), (1, 40, config.num_kv_heads, config.head_dim))
    v = jax.random.normal(jax.random.key(3), k.shape)
    gates = jnp.array([0.0, 1.0])
    chosen = attention is gated.chosen_attention
    out, _ = jax.jit(attention(**SIZES))(q, k, v, gates > 0.5 if chosen else gates)
    scale = config.head_dim**-0.5
    streaming, _ = jax.jit(functools.partial(streaming_attention, softmax_scale=scale, **SIZES))(
        q, k, v
    )
    error = 1e-6 if chosen else 0  # of one head at a time, sums have another order
    np.testing.assert_allclose(out[:, :, :2], streaming[:, :, :2], rtol=0, atol=error)
    full = jax.jit(functools.partial(full_attention, softmax_scale=scale))(q, k, v)
    np.testing.assert_allclose(out[:, :, 2:], full[:, :, 2:], rtol=0, atol=error)


def test_chosen_heads_compute_one_term_each():
    config, params = model()
    params = jax.device_put(params)

    def run(heads):
        attend = gated.chosen_attention(**SIZES)
        tokens = batch().tokens
        return llama.hidden_states(config, params, tokens, attend=attend, layer_inputs=heads)[0]

    program = jax.jit(run).lower(jnp.ones((2, 2), bool)).compile().as_text()
    assert program is not None
    assert " conditional(" in program


@pytest.mark.usefixtures("unhooked")  # the other tests check the hints
@pytest.mark.parametrize("mixing", [pytest.param("teacher", marks=pytest.mark.slow), "self"])
def test_gradient_equals_central_differences_in_float64(mixing):
    with jax.enable_x64(True):
        config, params = model()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        gates = some_gates().astype(jnp.float64)
        both = jax.jit(jax.value_and_grad(functools.partial(loss, mixing=mixing, params=params)))
        _, gradient = both(gates)
        step = 1e-5
        for index in np.ndindex(2, 2):
            nudge = jnp.zeros((2, 2), jnp.float64).at[index].set(step)
            difference = (both(gates + nudge)[0] - both(gates - nudge)[0]) / (2 * step)
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-6)
    assert config.num_layers == 2
    assert np.abs(gradient).min() > 0


def test_teacher_mixing_is_the_formula_with_a_constant_full_term():
    """Two layers by hand: the second layer's full term must come from the teacher's stream."""
    config, params = model()
    data, gates = batch(), some_gates()

    def student(q, k, v, layer_input):
        gate, full = layer_input
        streaming, _ = streaming_attention(q, k, v, softmax_scale=q.shape[-1] ** -0.5, **SIZES)
        weight = jnp.repeat(gate, 2)[None, None, :, None]
        return weight * full + (1 - weight) * streaming, None

    @jax.jit
    def by_hand(params, tokens, gates):
        x_teacher, teacher_out = llama.hidden_states(
            config, params, tokens, attend=gated.teacher_attention()
        )
        x_student, _ = llama.hidden_states(
            config, params, tokens, attend=student, layer_inputs=(gates, teacher_out)
        )
        difference = llama.final_norm(config, params, x_student) - llama.final_norm(
            config, params, x_teacher
        )
        return jnp.mean(jnp.square(difference[:, 40:60]))

    np.testing.assert_allclose(loss(gates), by_hand(params, data.tokens, gates), rtol=1e-5)


def test_only_real_tail_positions_count():
    data = batch()
    padding_changed = Batch(
        tokens=data.tokens.at[:, 60:].set(5),
        tail_start=data.tail_start,
        total_length=data.total_length,
    )
    np.testing.assert_array_equal(loss(some_gates()), loss(some_gates(), data=padding_changed))
    tail_changed = Batch(
        tokens=data.tokens.at[:, 59].set((data.tokens[0, 59] + 1) % 96),
        tail_start=data.tail_start,
        total_length=data.total_length,
    )
    assert loss(some_gates()) != loss(some_gates(), data=tail_changed)


def test_tail_at_the_very_end_is_cut_from_further_left():
    data = Batch(
        tokens=jnp.zeros((1, LENGTH), jnp.int32),
        tail_start=jnp.array([60]),
        total_length=jnp.array([64]),
    )
    x = jnp.arange(LENGTH, dtype=jnp.float32)[None, :, None]
    np.testing.assert_array_equal(tail_of(x, data, TAIL)[0, :, 0], np.arange(40, 64))
    np.testing.assert_array_equal(tail_positions(data, TAIL)[0], np.arange(40, 64))


def test_student_backward_holds_nothing_quadratic():
    """No array of the student's forward and backward pass has two axes as long as the text."""
    config, params = model()
    length = 1024
    data = Batch(
        tokens=jnp.zeros((1, length), jnp.int32),
        tail_start=jnp.array([1000]),
        total_length=jnp.array([length]),
    )
    full = jnp.zeros((2, 1, length, config.num_q_heads, config.head_dim))

    def student(gates):
        x, _ = llama.hidden_states(
            config,
            params,
            data.tokens,
            attend=gated.teacher_mixed_attention(**SIZES),
            layer_inputs=(gates, full),
            remat=True,
        )
        return jnp.sum(x)

    def quadratic(function) -> bool:
        jaxpr = jax.make_jaxpr(jax.grad(function))(jnp.ones((2, 2)))
        return any(
            np.prod([n for n in shape if n >= 128], initial=1) >= length * length // 32
            for shape in _shapes(jaxpr.jaxpr)
        )

    assert not quadratic(student)

    def self_student(gates):  # the check itself must be able to fail
        x, _ = llama.hidden_states(
            config,
            params,
            data.tokens,
            attend=gated.self_mixed_attention(**SIZES),
            layer_inputs=gates,
        )
        return jnp.sum(x)

    assert quadratic(self_student)


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_only_gates_get_gradients():
    """Nothing of a weight's shape is computed in the backward pass of the gates."""
    config, params = model()
    mlp_shape = (config.embed_size, config.mlp_size)

    def computes_weight_shapes(gradient, argument) -> bool:
        shapes = _shapes(jax.make_jaxpr(gradient)(argument).jaxpr)
        return any(shape[-2:] == mlp_shape for shape in shapes)

    assert not computes_weight_shapes(jax.grad(loss), some_gates())
    of_weights = jax.grad(lambda p: loss(some_gates(), params=p))
    assert computes_weight_shapes(of_weights, params)  # the check itself must be able to fail
