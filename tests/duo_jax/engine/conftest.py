"""The model that an engine serves in tests."""

import pytest

import duo_jax


@pytest.fixture(scope="session")
def model() -> duo_jax.DuoModel:
    return duo_jax.load("demo", sink_size=4, recent_size=12)
