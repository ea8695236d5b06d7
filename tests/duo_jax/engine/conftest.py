"""The model that an engine serves in tests."""

import pytest

import duo_jax
from tests.small_demo import small_demo


@pytest.fixture(scope="session")
def model() -> duo_jax.DuoModel:
    return duo_jax.load(small_demo(), sink_size=4, recent_size=12, prefill_chunk=64)
