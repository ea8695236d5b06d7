"""Whole programs of published models on eight A100 of 80 GB, compiled: bytes, and messages."""

import functools
import json
import pathlib

import pytest

from benchmarks import mesh_budgets
from benchmarks.budgets import BUDGET
from kernels.aot_process import Compiler

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "mesh_budgets.json"
DECODE = "Llama-3-70B, 50%: decode at 3,000,000"
CHUNK = "Llama-3-70B, 50%: chunk of 32,000, the last of 3,000,000"
SMALL = "Llama-3-70B, 50%, int8 weights, int4 KV: decode at 13,000,000"
SMALL_CHUNK = "Llama-3-70B, 50%, int8 weights, int4 KV: chunk of 32,000, the last of 13,000,000"
LAYERS = (14, 16)  # with 5 retrieval heads of 8


@functools.cache
def of_layers(compiler: Compiler, name: str, first: int, end: int) -> dict:
    return compiler.call(mesh_budgets.few_layers, name, first, end)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most", "workspace"),
    [
        (DECODE, 77.5e9, 0.05e9),
        (CHUNK, 80e9, 4e9),  # whose messages are looked at below
        (SMALL, BUDGET, 0.05e9),
        (SMALL_CHUNK, BUDGET, 4e9),
    ],
)
def test_two_layers_tell_that_all_of_them_fit(compiler, name, most, workspace):
    needs = of_layers(compiler, name, *LAYERS)["needs"]
    assert needs["temp"] <= workspace
    assert mesh_budgets.SERVING[name].held() + needs["temp"] <= most


def test_full_caches_do_not_fit():
    name = "Llama-3-70B, full caches: decode at 3,000,000"
    assert mesh_budgets.SERVING[name].held() > 1.5 * BUDGET


@pytest.mark.slow  # on eight processors tests/duo_jax/mesh/serving_on_devices.py counts them
@pytest.mark.parametrize("name", [DECODE, SMALL])
def test_a_layer_decodes_with_four_small_messages(compiler, name):
    one, two = (of_layers(compiler, name, LAYERS[1] - n, LAYERS[1])["messages"] for n in (1, 2))
    kinds = sorted(kind for kind, _ in two)
    for kind, _ in one:
        kinds.remove(kind)
    assert kinds == ["all-gather", "all-reduce", "all-reduce", "all-to-all"]
    # With int8 weights a token is two rows, in float32: 64 KiB for 8,192 channels.
    assert max(size for kind, size in two if kind != "all-gather") <= 2**16
    # Both ends gather the residual stream, and logits.
    gathered = sorted(size for kind, size in two if kind == "all-gather")
    assert gathered[-2] <= 64e3


@pytest.mark.slow
def test_a_chunk_moves_activations_and_neither_weights_nor_caches(compiler):
    model = mesh_budgets.LLAMA_3_70B
    found = of_layers(compiler, CHUNK, *LAYERS)["messages"]
    activations = 32_000 * model.embed_size * 2
    assert max(size for _, size in found) <= activations
    weights = {
        model.embed_size * columns * 2
        for columns in (model.mlp_size, model.num_q_heads * 128, model.num_kv_heads * 128)
    }
    assert not weights & {size for _, size in found}
    assert sum(kind == "all-reduce" for kind, _ in found) == 4


def test_results_keep_the_promised_bytes():
    """What was compiled with all layers (python -m benchmarks.mesh_budgets)."""
    programs = json.loads(RESULTS.read_text(encoding="utf-8"))["programs"]
    assert set(programs) == set(mesh_budgets.PROGRAMS)
    peaks = {name: program["peak"] for name, program in programs.items()}
    assert peaks[DECODE] <= 77.5e9
    assert programs[DECODE]["temp"] <= 0.05e9
    assert peaks[CHUNK] <= 80e9
    assert peaks["Llama-3-70B: identification step at 32,000"] <= 32e9
    assert peaks["Llama-3-70B: identification step at 128,000"] <= 70e9
    for name, peak in peaks.items():
        assert (peak <= BUDGET) == ("full caches" not in name), name
