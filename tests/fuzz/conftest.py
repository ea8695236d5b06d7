"""What the tests of hostile input share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def arguments_pass() -> Iterator[None]:
    """Let arguments through to the package's own checks, past the type checker of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
