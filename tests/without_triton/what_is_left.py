"""Run by tests/kernels/test_without_triton.py, in a process whose jax has no Triton lowering."""

import functools

import jax
import jax.numpy as jnp
import pytest

import duo_jax.session.runtime  # noqa: F401  # it starts
from kernels import compat, decode_attention, dispatch
from tests.kernels.mosaic_cases import A100, H200, described

Q, KV, LENGTHS = jnp.ones((1, 4, 64)), jnp.ones((1, 2, 8, 64)), jnp.array([5])


def attend(implementation, q=Q, kv=KV):
    return decode_attention(q, kv, kv, LENGTHS, softmax_scale=0.25, implementation=implementation)


def traced_for(gpu: str, dtype) -> str:
    with described(gpu):
        run = functools.partial(attend, "auto")
        return str(jax.make_jaxpr(run)(Q.astype(dtype), KV.astype(dtype)))


def test_auto_is_xla_on_a_cpu():
    out, _ = attend("auto")
    assert jnp.allclose(out, 1.0)
    assert out.shape == Q.shape


def test_auto_is_mosaic_on_a_hopper_where_it_has_a_kernel():
    assert ("duo_decode_mosaic" in traced_for(H200, jnp.bfloat16)) == (compat.no_mosaic() is None)
    for gpu, dtype in ((H200, jnp.float32), (A100, jnp.bfloat16)):
        assert "duo_decode" not in traced_for(gpu, dtype)


@pytest.mark.parametrize("name", ["triton", "interpret"])
@pytest.mark.parametrize("call", [dispatch.check, attend])
def test_a_named_kernel_is_skipped(call, name):
    call(name)


def test_another_failure_is_one():
    raise NotImplementedError("'auto' needs Pallas' Triton lowering, which jax 0 does not have")
