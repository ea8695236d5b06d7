"""A cache that does not fit into memory is refused in one line; other failures are not."""

import jax
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.session import memory
from duo_jax.session.limits import Limits
from duo_jax.session.row_cache import RowCache
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from duo_jax.session.timing import Timing
from tests import models
from tests.params import random_params

CONFIG = parse_config(models.llama(num_hidden_layers=1, max_position_embeddings=32_768))
GB = 10**9


def make_session(recent_size=8, max_len=None):
    heads = np.array([[True, False]])
    config = duo_config(CONFIG, heads, sink_size=4, recent_size=recent_size)
    params = split_params(CONFIG, random_params(CONFIG), heads)
    return Session(Runtime(config=config, params=params), max_len=max_len)


@pytest.mark.parametrize("sizes", [{"max_len": 2**31 - 1}, {"recent_size": 2**31 - 9}], ids=str)
def test_a_cache_that_no_machine_holds_is_refused(sizes):
    session = make_session(**sizes)
    line = r"^the cache would take \d[\d,]+\.\d GB, and there are [\d,.]+ GB of memory: fewer "
    with pytest.raises(InputError, match=line):
        session.append([[1, 2]])
    assert session.tokens == [[]]


def test_a_cache_that_cannot_grow_stays_as_it_is(monkeypatch):
    held = RowCache(make_session().runtime, 1, Limits(architecture=CONFIG, max_len=None), Timing())
    held.reserve(10)
    cache, slots = held.cache, held.slots
    monkeypatch.setattr(memory, "device_memory", lambda: 2 * cache.nbytes)
    with pytest.raises(InputError, match="GB of memory"):
        held.reserve(20_000)
    assert (held.cache, held.slots) == (cache, slots)


def test_memory_that_is_there_but_not_free_is_refused():
    with (
        pytest.raises(InputError, match=r"^the cache would take 2\.0 GB, and less memory is free$"),
        memory.for_cache(2 * GB),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_other_failures_are_not_the_users():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.for_cache(GB):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")
