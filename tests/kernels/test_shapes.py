"""Arrays that do not fit are refused by every implementation, in one line."""

import jax.numpy as jnp
import pytest

from kernels import streaming_attention
from tests.kernels import refused_shapes


@pytest.mark.usefixtures("unhooked")  # the type checker would refuse them first
def test_what_does_not_fit_is_refused():
    assert refused_shapes.accepted() == []


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_window_beyond_32_bits_is_the_whole_text(implementation):
    q, kv = jnp.ones((2, 20, 4, 16)), jnp.ones((2, 20, 2, 16))
    options = {"softmax_scale": 1.0, "implementation": implementation, "sink_size": 0}
    everything, _ = streaming_attention(q, kv, kv, recent_size=2**31, **options)
    window, _ = streaming_attention(q, kv, kv, recent_size=20, **options)
    assert jnp.array_equal(everything, window)
