"""The dtype of sums."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """Return float32, or float64 for float64 data: the dtype of sums, norms and softmax."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
