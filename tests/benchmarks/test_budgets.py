"""Whole programs of published models, compiled for one A100 of 80 GB: they must fit its memory.

The quick tests compile two layers of a program: what all layers hold is known by their shapes, and
they share their workspace. By default a decode step is compiled, of which the cache is updated in
place; a chunk is in test_mesh_budgets.py. The slow tests compile every program, with all layers
too, and demand the same.
"""

import functools

import jax.numpy as jnp
import pytest

from benchmarks import budgets
from benchmarks.budgets import BUDGET
from benchmarks.gpu.models import LLAMA_3_8B
from benchmarks.identify import self_mixing_flops
from duo_jax.cache import cache_bytes
from kernels.aot_process import Compiler
from kernels.gpu import GPUS

# The last layers but one keep 5 and 8 retrieval heads of 8 (Llama 3), the last ones 12 and 16 of 32
# (Llama 2): no layer needs more workspace.
LAYERS = {"Llama-3-8B": (29, 31), "Llama-2-7B": (30, 32)}
TOO_LONG = [name for name in budgets.SERVING if any(x in name for x in ("full", "4,400", "7,150"))]
FITS = [name for name in budgets.SERVING if name not in TOO_LONG]
QUANTISED = [name for name in FITS if "KV" in name]


@functools.cache
def compiled(
    compiler: Compiler, name: str, layers: tuple[int, int] | None = None
) -> dict[str, int]:
    return compiler.call(budgets.compile_program, name, layers)


def two_layers(compiler: Compiler, name: str) -> dict[str, int]:
    return compiled(compiler, name, LAYERS[name.split(",")[0]])


def peak_from_two_layers(compiler: Compiler, name: str) -> int:
    return budgets.SERVING[name].held() + two_layers(compiler, name)["temp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "held", "temp"),
    [
        ("Llama-3-8B, 50%: decode at 1,000,000", 82e9, 0.1e9),
        ("Llama-3-8B, 50%: chunk of 32,000 at 900,000", 78e9, 5e9),
        ("Llama-2-7B, 25%: decode at 200,000", 40e9, 0.1e9),
        ("Llama-2-7B, 25%: chunk of 10,000 at 190,000", 40e9, 3e9),
    ],
)
def test_programs_fit_with_one_cache_that_is_updated_in_place(compiler, name, held, temp):
    program, memory = budgets.SERVING[name], two_layers(compiler, name)
    part = program.of_layers(slice(*LAYERS[name.split(",")[0]]))
    cache = cache_bytes(part.config, batch_size=1, max_len=part.max_len, dtype="bfloat16")
    assert program.held() <= held
    assert peak_from_two_layers(compiler, name) <= BUDGET
    assert memory["arguments"] == pytest.approx(part.held(), abs=1e6)
    assert cache <= memory["updated_in_place"] <= cache + 1e6
    assert memory["peak"] <= memory["arguments"] + temp


def test_llama_3_without_duo_attention_does_not_fit():
    assert budgets.SERVING["Llama-3-8B, full caches: decode at 1,000,000"].held() > 1.5 * BUDGET


@pytest.mark.slow
@pytest.mark.parametrize(("length", "budget"), [(32_000, 45e9), (96_000, BUDGET)])
def test_llama_3_is_identified_on_one_gpu(compiler, length, budget):
    name = f"Llama-3-8B: identification step at {length:,}"
    assert compiled(compiler, name)["peak"] <= budget


@pytest.mark.slow
def test_a_gradient_through_full_attention_needs_no_scores(compiler):
    """In blocks of XLA's it takes 94 GB; and no output of the teacher is kept."""
    peak = compiled(compiler, "Llama-3-8B: identification step, self mixing, at 96,000")["peak"]
    assert peak <= 56e9
    assert peak < compiled(compiler, "Llama-3-8B: identification step at 96,000")["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["masks", "attribution"])
def test_a_gradient_of_the_next_token_loss_fits_with_much_room(compiler, step):
    """The output projection is kept once. A copy for each block of logits made it 93 GB."""
    assert compiled(compiler, f"Llama-3-8B: {step} step at 32,000")["peak"] <= 32e9


def test_steps_that_differentiate_full_attention_take_seconds_on_one_gpu():
    """Counted, at the data sheet's rate, which no program reaches: three quarters of it at most."""
    model = LLAMA_3_8B.architecture
    operations = self_mixing_flops(model, 32_000, sink=128, recent=256)
    assert 5 < operations / GPUS["a100-80g"].flops < 10


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int4", "int2"])
def test_the_longest_chunk_fits_and_ten_percent_more_does_not(compiler, kv):
    fits, too_long = (
        next(name for name in reversed(names) if f"{kv} KV: chunk" in name)
        for names in (QUANTISED, TOO_LONG)
    )
    assert 10 * budgets.SERVING[too_long].context == 11 * budgets.SERVING[fits].context
    assert peak_from_two_layers(compiler, fits) <= BUDGET
    workspace = two_layers(compiler, fits)["temp"]  # of a chunk, whatever the context
    assert budgets.SERVING[too_long].held() + workspace > BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int4", "int2"])
def test_nothing_as_large_as_a_dequantised_cache_is_ever_in_memory(compiler, kv):
    """Of one head's keys, even; in the last layer but one, whose heads all retrieve."""
    name = next(name for name in reversed(QUANTISED) if f"{kv} KV: decode" in name)
    program = budgets.SERVING[name]
    one_head = (
        program.context * program.config.architecture.head_dim * jnp.dtype("bfloat16").itemsize
    )
    assert program.config.retrieval_counts[30] == program.config.architecture.num_kv_heads
    assert compiled(compiler, name, (30, 31))["temp"] < 0.05 * one_head


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_all_layers_need_what_two_layers_tell(compiler, name):
    memory, program = compiled(compiler, name), budgets.SERVING[name]
    assert memory["peak"] <= BUDGET
    assert memory["arguments"] == pytest.approx(program.held(), abs=1e6)
    assert memory["peak"] == pytest.approx(peak_from_two_layers(compiler, name), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_LONG)
def test_programs_that_are_too_long_do_not_fit(compiler, name):
    assert compiled(compiler, name)["peak"] > BUDGET
