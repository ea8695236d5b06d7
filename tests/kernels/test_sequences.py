"""Attention within sequences through XLA: heads in turn, and sizes that are impossible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import full_attention, heads, streaming_attention
from kernels.full import cases as full
from kernels.streaming import cases as streaming


@pytest.mark.parametrize(
    "case",
    [full.AWKWARD["odd length, group of 7"], streaming.AWKWARD["odd length, group of 7"]],
    ids=["full", "streaming"],
)
def test_heads_in_turn_give_what_heads_together_give(case, monkeypatch):
    case = case.__class__(**{**vars(case), "q_heads": 8, "kv_heads": 4})
    arguments = case.draw()
    together = case.run(*arguments, implementation="xla")[0]
    monkeypatch.setattr(heads, "_SCORE_BYTES", 1)
    in_turn = case.run(*arguments, implementation="xla")[0]
    np.testing.assert_allclose(together, in_turn, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"sink_size": -1, "recent_size": 4},
                                   {"sink_size": 1, "recent_size": 0}])  # fmt: skip
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least"):
        streaming_attention(*streaming.AWKWARD["three tokens"].draw(), softmax_scale=1.0, **sizes)


@pytest.mark.slow  # test_cases.py compares the gradients of both with float64
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_gradients_through_the_kernel_are_those_of_xla(op):
    """By a loss that is no linear function of the output."""
    q, k, v = full.FullCase(
        length=37, batch=2, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"
    ).draw()

    def loss(implementation, q, k, v):
        if op == "full":
            out = full_attention(q, k, v, softmax_scale=0.25, implementation=implementation)
        else:
            sizes = {"sink_size": 3, "recent_size": 8, "softmax_scale": 0.25}
            out, _ = streaming_attention(q, k, v, **sizes, implementation=implementation)
        return jnp.sum(jnp.sin(out))

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, name), (0, 1, 2)))(q, k, v)
        for name in ("interpret", "xla")
    ]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
