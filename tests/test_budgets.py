"""Whole programs of published models, compiled for one A100 of 80 GB: they must fit its memory."""

import functools
import json
import os
import subprocess
import sys

import pytest

from duo_jax.cache import cache_bytes
from kernels import aot
from tests import budget_worker as worker

BUDGET = 83e9  # of the 85.1e9 bytes of an A100-80G

reason = aot.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")


@functools.cache
def compiled(name: str) -> dict[str, int]:
    """Return the bytes of a program of budget_worker."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.budget_worker", name],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_serves(name: str, config, *, max_len: int, temp: float):
    """Fits, and the cache is there once: updated in place, without copies beside it."""
    memory = compiled(name)
    cache = cache_bytes(config, batch_size=1, max_len=max_len, dtype="bfloat16")
    assert memory["peak"] <= BUDGET
    assert cache <= memory["updated_in_place"] <= cache + 1e6
    assert memory["peak"] <= memory["arguments"] + temp


def test_llama_3_decodes_at_a_million_tokens():
    assert_serves("llama-3 decode at 1M", worker.DUO_3, max_len=1_000_001, temp=0.1e9)


def test_llama_3_reads_a_chunk_of_32000_at_900_thousand_tokens():
    name = "llama-3 chunk of 32,000 at 900K"
    assert_serves(name, worker.DUO_3, max_len=932_000, temp=5e9)


def test_llama_3_without_duo_attention_does_not_fit():
    assert compiled("llama-3 decode at 1M without DuoAttention")["peak"] > 1.5 * BUDGET


@pytest.mark.slow
def test_llama_2_decodes_at_200_thousand_tokens():
    assert_serves("llama-2 decode at 200K", worker.DUO_2, max_len=200_001, temp=0.1e9)


@pytest.mark.slow
def test_llama_2_reads_a_chunk_of_10000_at_190_thousand_tokens():
    assert_serves("llama-2 chunk of 10,000 at 190K", worker.DUO_2, max_len=200_000, temp=3e9)


@pytest.mark.parametrize(("length", "budget"), [(32_000, 45e9), (96_000, BUDGET)])
def test_llama_3_is_identified_on_one_gpu(length, budget):
    assert compiled(f"identification at {length:,}")["peak"] <= budget
