"""Derivatives that no kernel has are refused in one line; others pass what refuses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import (
    Past,
    decode_attention,
    full_attention,
    merge_lse,
    prefill_attention,
    streaming_attention,
)
from kernels.no_gradient import refuse_gradient
from kernels.packed import INT4, pack

Q, KV = jnp.ones((1, 20, 2, 16)), jnp.ones((1, 20, 1, 16))
CACHED = jnp.ones((1, 1, 4, 16))
PAST = Past(
    sink_keys=CACHED,
    sink_values=CACHED,
    recent_keys=CACHED,
    recent_values=CACHED,
    lengths=jnp.array([9]),
)
SIZES = {"sink_size": 4, "recent_size": 4, "softmax_scale": 0.25, "implementation": "interpret"}


def streaming(q, past=None, **options):
    return streaming_attention(q, KV, KV, past=past, **{**SIZES, **options})[0]


def full(q, implementation="interpret"):
    return full_attention(q, KV, KV, softmax_scale=0.25, implementation=implementation)


def gradient(function):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))))


def jvp(function):
    return lambda x: jax.jvp(function, (x,), (x,))


def refusing(x):
    return refuse_gradient(jnp.sin, "no gradient here")(x)


DERIVATIVES = {
    "gradient": gradient,
    "forward mode": jvp,
    "gradient of a jitted function": lambda f: gradient(jax.jit(f)),
    "jitted gradient": lambda f: jax.jit(gradient(f)),
    "gradient of a checkpoint": lambda f: gradient(jax.checkpoint(f)),
    "gradient of a batch": lambda f: gradient(jax.vmap(f)),
    "batch of gradients": lambda f: jax.vmap(gradient(f)),
}


@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_every_derivative_is_refused(derive):
    with pytest.raises(NotImplementedError, match=r"^no gradient here(\n|$)"):
        derive(refusing)(jnp.ones(3))


def test_what_is_not_differentiated_is_let_through():
    x = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(jax.vmap(refusing))(x), jnp.sin(x), atol=1e-6)

    def loss(x):
        def step(carry, _):
            seen, constant = carry
            return (seen * refusing(jax.lax.stop_gradient(seen)), refusing(constant)), None

        (seen, constant), _ = jax.lax.scan(jax.checkpoint(step), (x, jnp.ones(3)), length=2)
        return jnp.sum(seen * constant)

    assert np.isfinite(jax.grad(loss)(x)).all()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_gradients_with_a_past_are_refused(wrap):
    with pytest.raises(NotImplementedError, match=r"no gradient with a past; .*'xla' has(\n|$)"):
        gradient(wrap(functools.partial(streaming, past=PAST)))(Q)
    with pytest.raises(NotImplementedError, match="no gradient with a past"):
        # Nor by the past itself, which a tree of arrays holds.
        gradient(lambda x: streaming(Q, PAST.__class__(**{**vars(PAST), "sink_keys": x})))(CACHED)


WITH_A_GRADIENT = pytest.mark.parametrize("function", [streaming, full], ids=["streaming", "full"])


@pytest.mark.one_in(2)
@WITH_A_GRADIENT
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_second_derivatives_of_the_kernels_are_refused(function, wrap):
    with pytest.raises(NotImplementedError, match=r"no second derivatives; .*'xla' has(\n|$)"):
        gradient(wrap(gradient(function)))(Q)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_derivatives_of_the_merging_kernel_are_refused(derive):
    def merged(lses, implementation="interpret"):
        return merge_lse(jnp.ones((*lses.shape, 16)), lses, implementation=implementation)[1]

    with pytest.raises(NotImplementedError, match=r"kernel of merge_lse has no gradient; .*'xla'"):
        derive(merged)(jnp.ones((3, 3)))
    shares = jax.grad(lambda lses: jnp.sum(merged(lses, "xla")))(jnp.zeros((3, 3)))
    np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("is_packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("op", [decode_attention, prefill_attention], ids=["decode", "prefill"])
def test_gradients_of_attention_over_caches_are_refused(op, is_packed):
    cache = jnp.ones((1, 2, 64, 16))
    cache = pack(cache, INT4) if is_packed else cache
    q = jnp.ones((1, 4, 16) if op is decode_attention else (1, 3, 4, 16))

    def loss(q):
        options = {"softmax_scale": 0.25, "implementation": "interpret"}
        return op(q, cache, cache, jnp.array([9]), **options)[0].sum()

    assert np.isfinite(loss(q))
    with pytest.raises(NotImplementedError, match="has no gradient; full_attention and"):
        jax.grad(loss)(q)


@pytest.mark.slow
def test_xla_has_the_derivatives_that_the_messages_promise():
    xla = functools.partial(streaming, implementation="xla")
    for derivative in (
        gradient(functools.partial(xla, past=PAST)),
        gradient(gradient(xla)),
        gradient(gradient(functools.partial(full, implementation="xla"))),
        lambda q: jvp(xla)(q)[1],
    ):
        assert np.isfinite(jax.jit(derivative)(Q)).all()


@pytest.mark.one_in(2)
@WITH_A_GRADIENT
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_forward_mode_of_kernels_with_a_gradient_is_refused_by_jax(function, wrap):
    with pytest.raises(TypeError, match="forward-mode"):
        jvp(wrap(function))(Q)
