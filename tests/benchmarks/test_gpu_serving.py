"""The report's stage of whole models fits memory and time, and README's table comes from it."""

import functools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_table
from benchmarks.gpu import decode, memory, models, prefill, serving_stage
from benchmarks.gpu.settings import real, smoke
from benchmarks.gpu.tables import Table
from benchmarks.serving import floors
from duo_jax.errors import InputError
from duo_jax.heads import split
from duo_jax.model import llama
from tests.benchmarks.gpu_tables import new_table

_SIZES: dict[str, int] = {}


def remembered(needed_bytes):
    """Count the bytes of a program once: the type checker makes that slow."""

    def count(program) -> int:
        if program.name not in _SIZES:
            _SIZES[program.name] = needed_bytes(program)
        return _SIZES[program.name]

    return count


H200_BYTES = int(0.95 * 141e9)


@pytest.fixture
def programs(monkeypatch):
    """Let programs compile and run in no time, on an H200 whose memory they fill; list them."""
    ran, peaks = [], [10e9]  # what earlier stages took

    def workspace(program):
        """That of a prompt is why parameters and caches alone do not tell the order."""
        return types.SimpleNamespace(temp_bytes=4e9 if isinstance(program, prefill.Prefill) else 0)

    def measure(program, *arguments):
        table = arguments[-1]
        watch, temp = memory.Watch(), workspace(program).temp_bytes
        peaks.append(max(peaks[-1], program.needed_bytes() + temp))
        ran.append(program.name)
        table.add(name=program.name, what="", memory=watch.report(temp_bytes=temp))

    for kind in (decode.Decoding, prefill.Prefill):
        monkeypatch.setattr(kind, "needed_bytes", remembered(kind.needed_bytes))
        monkeypatch.setattr(kind, "compile", workspace)
        monkeypatch.setattr(kind, "measure", measure)
    monkeypatch.setattr(models, "random_params", lambda *_: {})
    monkeypatch.setattr(memory, "_stats", lambda: {
        "bytes_limit": H200_BYTES, "bytes_in_use": 0, "peak_bytes_in_use": peaks[-1]
    })  # fmt: skip
    return ran


@pytest.mark.slow
def test_every_published_program_raises_the_peak_of_memory(programs, tmp_path):
    table = new_table(tmp_path, seconds=570)
    serving_stage.run(real(), table)
    assert (table.not_reached, table.does_not_fit) == ([], [])
    assert len(programs) == 10  # per model: prompts and contexts, full and split, one split longer
    peaks = [row["memory"]["peak_bytes"] for row in table.rows]
    assert None not in peaks
    assert peaks == sorted(peaks)


@pytest.mark.slow
def test_programs_that_do_not_fit_the_memory_are_listed(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "H200_BYTES", int(0.95 * 85e9))
    table = new_table(tmp_path, seconds=570)
    serving_stage.run(real(), table)
    assert "Llama-3-8B-1048k full, decode at 400,000" in programs
    assert len(programs) == 9
    assert table.not_reached == []
    assert [line.partition(": needs ")[0] for line in table.does_not_fit] == [
        "Llama-2-7B-32K full, decode at 134,000",
        "Llama-3-8B-1048k full, decode at 517,000",
        "Llama-3-8B-1048k full, decode at 500,000",
        "Llama-3-8B-1048k duo, decode at 1,000,000",
    ]


def test_both_prompts_of_a_model_are_left_out_where_the_time_is_not_for_both(
    programs, tmp_path, monkeypatch
):
    """One alone gives no speed-up. What is quicker is measured."""
    monkeypatch.setattr(Table, "time_left", 200.0)
    table = new_table(tmp_path)
    serving_stage.run(real(), table)
    first, second = table.not_reached
    assert first.startswith("Llama-3-8B-1048k duo, prefill of 320,000: about 2")
    assert second.startswith("Llama-3-8B-1048k full, prefill of 320,000: as Llama-3-8B-1048k duo")
    assert len(programs) == 8


def test_programs_whose_workspace_does_not_fit_are_not_run(programs, tmp_path, monkeypatch):
    """Known once they are compiled: parameters and caches alone would fit."""
    monkeypatch.setattr(sys.modules[__name__], "H200_BYTES", int(67e9 / 0.97))
    table = new_table(tmp_path)
    serving_stage.run(real(), table)
    assert "Llama-2-7B-32K full, prefill of 100,000" not in programs
    assert any(
        line.startswith("Llama-2-7B-32K full, prefill of 100,000: needs 69.")
        for line in table.does_not_fit
    )


def test_gpu_table_is_filled_by_a_run(tmp_path):
    file = tmp_path / "serving.json"
    assert gpu_table.to_markdown(gpu_table.read(file)).count("not measured yet") == 4
    header = {
        "smoke": False, "does_not_fit": [], "hardware": "NVIDIA H200", "jax": "0.11.2",
        "dtype": "bfloat16", "prefill_mode": "exact",
        "models": [{"name": "a", "sink": 1, "recent": 2, "chunk": 3_000}],
    }  # fmt: skip
    name = models.LLAMA_3_8B.name
    rows = [
        {"what": "decode", "model": name, "context": 500_000, "speedup": 1.4},
        {"what": "decode", "model": name, "context": 517_000, "name": "full"},
        {
            "what": "decode",
            "model": name,
            "context": 517_000,
            "speedup": 1.61,
            "ms": {"median": 10.0},
        },
        {"name": "another", "failed": "of memory"},
    ]
    file.write_text(json.dumps(header | {"rows": rows}))
    printed = gpu_table.to_markdown(gpu_table.read(file))
    assert (
        f"| decode speed-up, {name}, 50% retrieval heads, 517K tokens | 1.69 | 1.50 | **1.61** | "
        "16.1, 10.0 ms a token |" in (printed)
    )
    assert printed.count("not measured yet") == 3
    assert "NVIDIA H200, jax 0.11.2, bfloat16" in printed
    name = models.LLAMA_2_7B.name
    too_large = [f"{name} full, decode at 134,000: needs 84 GB of 81 GB"]
    file.write_text(json.dumps(header | {"rows": [], "does_not_fit": too_large}))
    assert "| 2.70 | 2.18 | full does not fit |" in gpu_table.to_markdown(gpu_table.read(file))
    for content, message in (
        ("{", "is not JSON"),
        ("{}", "is not a result"),
        (json.dumps(header), "there is no rows"),
        (json.dumps(header | {"rows": [], "smoke": True}), "smoke run"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            gpu_table.read(file)


def test_floors_of_the_published_models_are_those_of_the_published_points():
    # SPEC sections 5 and 6.
    for published, heads, of_decode, of_prefill in (
        (models.LLAMA_2_7B, 256, 2.70, 1.99),
        (models.LLAMA_3_8B, 128, 1.69, 1.75),
    ):
        assert sum(published.retrieval_counts) == heads
        duo, full = (variant.config for variant in published.variants)
        read = functools.partial(
            floors.decode_bytes, context=published.contexts[0], dtype="bfloat16"
        )
        assert read(full)["step"] / read(duo)["step"] == pytest.approx(of_decode, abs=0.02)
        multiply = functools.partial(floors.prefill_flops, length=published.prompt)
        assert multiply(full)["all"] / multiply(duo)["all"] == pytest.approx(of_prefill, abs=0.02)


def test_random_parameters_are_in_serving_form():
    model = smoke().models[0].architecture
    params = models.random_params(model, jnp.float32)
    init = functools.partial(llama.init_params, model)
    heads = np.ones((model.num_layers, model.num_kv_heads), bool)
    expected = jax.eval_shape(
        lambda key: split.split_params(model, init(key), heads), jax.random.key(0)
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    gate = params["layers"][0]["mlp"]["gate_proj"]["kernel"]
    assert float(jnp.std(gate)) == pytest.approx(1 / math.sqrt(model.embed_size), rel=0.1)
