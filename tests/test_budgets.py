"""Whole programs of published models, compiled for one A100 of 80 GB: they must fit its memory."""

import functools

import pytest

from benchmarks import budgets
from benchmarks.budgets import BUDGET
from duo_jax.cache import cache_bytes

pytestmark = pytest.mark.usefixtures("gpu_compiler")

compiled = functools.cache(budgets.in_own_process)


def assert_serves(name: str, config, *, max_len: int, temp: float):
    """Fits, and the cache is there once: updated in place, without copies beside it."""
    memory = compiled(name)
    cache = cache_bytes(config, batch_size=1, max_len=max_len, dtype="bfloat16")
    assert memory["peak"] <= BUDGET
    assert cache <= memory["updated_in_place"] <= cache + 1e6
    assert memory["peak"] <= memory["arguments"] + temp


def test_llama_3_decodes_at_a_million_tokens():
    assert_serves(
        "Llama-3-8B, 50%: decode at 1,000,000", budgets.DUO_3, max_len=1_000_001, temp=0.1e9
    )


def test_llama_3_reads_a_chunk_of_32000_at_900_thousand_tokens():
    name = "Llama-3-8B, 50%: chunk of 32,000 at 900,000"
    assert_serves(name, budgets.DUO_3, max_len=932_000, temp=5e9)


def test_llama_3_without_duo_attention_does_not_fit():
    assert compiled("Llama-3-8B, full caches: decode at 1,000,000")["peak"] > 1.5 * BUDGET


@pytest.mark.slow
def test_llama_2_decodes_at_200_thousand_tokens():
    assert_serves("Llama-2-7B, 25%: decode at 200,000", budgets.DUO_2, max_len=200_001, temp=0.1e9)


@pytest.mark.slow
def test_llama_2_reads_a_chunk_of_10000_at_190_thousand_tokens():
    assert_serves(
        "Llama-2-7B, 25%: chunk of 10,000 at 190,000", budgets.DUO_2, max_len=200_000, temp=3e9
    )


@pytest.mark.parametrize(("length", "budget"), [(32_000, 45e9), (96_000, BUDGET)])
def test_llama_3_is_identified_on_one_gpu(length, budget):
    assert compiled(f"Llama-3-8B: identification step at {length:,}")["peak"] <= budget
