"""Strictness for every test: no silent promotion of dtypes or ranks; warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny programs spend their time in the compiler; without its last optimisations, half of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def gpu_compiler() -> None:
    """Skip where nothing can be compiled for a GPU, saying what is missing."""
    from kernels import aot  # after the type checker is in place

    reason = aot.unavailable()
    if reason is not None:
        pytest.skip(reason)
