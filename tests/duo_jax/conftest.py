"""Fixtures that several test files of duo_jax share."""

import jaxtyping
import pytest


@pytest.fixture
def unhooked():
    """Call functions as a user does, who has no checker of type hints in front of them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
