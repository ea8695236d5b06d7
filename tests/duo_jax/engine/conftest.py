"""The model that an engine serves in tests."""

import pytest

import duo_jax
from tests.half_demo import half_demo


@pytest.fixture(scope="session")
def model() -> duo_jax.DuoModel:
    return duo_jax.load(half_demo(), sink_size=4, recent_size=12)
