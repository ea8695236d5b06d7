"""Fixtures that several test files of duo_jax share."""

import jax
import jaxtyping
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Compile without machine-code optimisation: tiny models spend their time in the compiler."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unhooked():
    """Call functions as a user does, who has no checker of type hints in front of them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
