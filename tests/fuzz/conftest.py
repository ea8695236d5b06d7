"""What the tests of hostile input share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _without_the_type_checker_of_the_tests() -> Iterator[None]:
    """Let arguments through to the package's own checks, and measure the package's own time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
