"""The GPU report runs to its end in miniature, and its checks and judgements can fail."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import floors, gpu_report, gpu_table
from benchmarks.gpu import (
    arrays,
    block_sweep,
    checks,
    decode,
    memory,
    models,
    prefill,
    references,
    rivals,
    serving_stage,
    tables,
    targets,
)
from benchmarks.gpu.settings import (
    DECODE_500K,
    FULL_32K,
    STREAMING_32K,
    packed_name,
    real,
    smoke,
)
from benchmarks.gpu.tables import Stage, Table
from duo_jax import llama, split
from duo_jax.errors import InputError
from kernels.decode.cases import DecodeCase
from kernels.full.cases import FullCase
from kernels.gpu import H200
from kernels.packed.cases import PackedDecodeCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase

SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 16}
DECODE = DecodeCase(lengths=(33, 0), slots=40, dtype="float32", **SMALL)


def new_table(folder, *, seconds=60.0) -> Table:
    return Table("some", folder=folder, header={"gpu": "none"}, deadline=time.monotonic() + seconds)


def test_smoke_run_writes_every_table_and_goes_on_after_a_failed_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--smoke", "--fail", "sweep"]
    ran = subprocess.run(
        command,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu_report.STAGES
    }
    for name, table in found.items():
        assert table["smoke"] is True
        assert {"hardware", "jax", "jaxlib", "driver", "dtype", "prefill_mode"} <= table.keys()
        assert table["models"][0].keys() >= {"sink", "recent", "chunk", "contexts"}
        if name != "sweep":
            assert table["status"] == "complete", table
            assert table["rows"], name
            assert not any("failed" in row for row in table["rows"]), table
    assert found["sweep"]["status"] == "failed: RuntimeError: --fail sweep"
    # A lent machine gives back 8 files; one of them may be the log.
    assert len(list(tmp_path.iterdir())) <= 7

    assert all(row["passed"] for row in found["checks"]["rows"])
    assert found["checks"]["rows"][0]["outputs_in_poisoned_buffers"] > 0
    for row in found["kernels"]["rows"]:
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
        assert set(row["rivals"]) == set(rivals.TIMERS)
    duo = [row for row in found["serving"]["rows"] if row["name"] == "duo"]
    duo.sort(key=lambda row: row["what"])
    assert [row.get("context", row.get("length")) for row in duo] == [64, 32, 32]
    assert all(row["speedup"] > 0 and row["floor_speedup"] > 1 for row in duo)
    params = models.param_bytes(smoke().models[0].model, "float32")
    assert duo[0]["memory"]["counted_bytes"] > duo[0]["cache_bytes"] + params
    judged = json.loads((tmp_path / "targets.json").read_text())["targets"]

    printed = ran.stdout.splitlines()
    printed = printed[next(i for i, line in enumerate(printed) if line.startswith("SMOKE")) :]
    assert len(printed) <= 40
    assert "checks: 3 passed, 0 failed, 0 not reached" in ran.stdout
    for bits, floor in ((8, 4488 / 1584), (4, 4488 / 1056), (2, 4488 / 693)):
        line = next(x for x in printed if f"500K, int{bits} KV: " in x)
        assert float(line.split("floor ")[1].split("x")[0]) == pytest.approx(floor, abs=0.01)
    assert "stage sweep: failed: RuntimeError: --fail sweep, 0 rows" in printed
    for target, line in zip(judged, printed[-len(judged) :], strict=True):
        assert target["what"][:60] in line
        assert target["status"] in line


def test_a_sweep_writes_the_best_of_what_it_tried(tmp_path):
    table = new_table(tmp_path)
    block_sweep.run(smoke(), table)
    assert len(table.rows) == 6
    for row in table.rows:
        assert row["best"]["seconds"] <= row["default"]["seconds"]


def test_without_time_everything_is_listed_as_not_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "_GRACE", 1e4)  # what comes after it ends the process
    words = ["--smoke", "--out", str(tmp_path), "--minutes", "0.00001"]
    words += ["--stages", "checks,serving"]
    assert gpu_report.main(gpu_report._parse(words), began=time.monotonic()) == 0
    found = json.loads((tmp_path / "serving.json").read_text())
    assert found["rows"] == []
    assert [line.split(":")[0] for line in found["not_reached"]] == [
        "tiny duo, prefill of 32", "tiny full, prefill of 32",
        "tiny duo, decode at 64", "tiny full, decode at 64",
    ]  # fmt: skip
    assert found["status"] == "out of time"
    assert "checks: 0 passed, 0 failed, 3 not reached" in capsys.readouterr().out


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


def test_every_published_program_raises_the_peak_of_memory(programs, tmp_path):
    table = new_table(tmp_path, seconds=570)
    serving_stage.run(real(), table)
    assert (table.not_reached, table.does_not_fit) == ([], [])
    assert len(programs) == 10  # per model: prompts and contexts, full and split, one split longer
    peaks = [row["memory"]["peak_bytes"] for row in table.rows]
    assert None not in peaks
    assert peaks == sorted(peaks)


def test_programs_that_do_not_fit_the_memory_are_listed(programs, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_gpu_report.H200_BYTES", int(0.95 * 85e9))
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
    monkeypatch.setattr("tests.test_gpu_report.H200_BYTES", int(67e9 / 0.97))
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
        {"what": "decode", "model": name, "context": 517_000, "speedup": 1.61},
        {"name": "another", "failed": "of memory"},
    ]
    file.write_text(json.dumps(header | {"rows": rows}))
    printed = gpu_table.to_markdown(gpu_table.read(file))
    assert (
        f"| decode speed-up, {name}, 50% retrieval heads, 517K tokens | 1.69 | 1.50 | **1.61** |"
        in (printed)
    )
    assert printed.count("not measured yet") == 3
    assert "NVIDIA H200, jax 0.11.2, bfloat16" in printed
    name = models.LLAMA_2_7B.name
    too_large = [f"{name} full, decode at 134,000: needs 84 GB of 81 GB"]
    file.write_text(json.dumps(header | {"rows": [], "does_not_fit": too_large}))
    assert "| 2.70 | 2.18 | full does not fit |" in gpu_table.to_markdown(gpu_table.read(file))
    for content, message in (
        ("{", "is not a result"),
        ("[]", "is not a result"),
        (json.dumps(header), "there is no rows"),
        (json.dumps(header | {"rows": [], "smoke": True}), "smoke run"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            gpu_table.read(file)


def test_a_real_run_needs_a_gpu_and_says_so(capsys):
    assert gpu_report.main(gpu_report._parse([]), began=time.monotonic()) == 2
    assert capsys.readouterr().err.startswith("error: jax runs on cpu here")


@pytest.mark.parametrize(
    "words", [["--stages", "checks,nothing"], ["--minutes", "0"], ["--minutes", "nan"]]
)
def test_flags_that_mean_nothing_are_refused(words):
    with pytest.raises(SystemExit, match="2"):
        gpu_report._parse(words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(DecodeCase):
    """A kernel with a fault; its XLA version is sound."""

    fault: str

    def run(self, *arguments, implementation, block_sizes=None):
        out, lse = super().run(*arguments, implementation="xla", block_sizes=block_sizes)
        if implementation == "xla":
            return out, lse
        if self.fault == "wrong":
            out = out * 1.0001
        elif self.fault == "unwritten":
            out = write_half(out)
        elif self.fault == "empty row":
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        elif self.fault == "race":
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            out = out + jax.pure_callback(lambda: np.float32(next(NOISE)), shape) * 1e-7
        return out, lse


NOISE = iter(range(100))


def write_half(x):
    """Copy x by a kernel that forgets half of the rows."""

    def kernel(x_ref, out_ref):
        out_ref[0] = x_ref[0]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(
        x
    )


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("none", None),
        ("wrong", "output 0: error 1.00e-04, XLA's 0.00e+00 (all)"),
        ("unwritten", "output 0: error nan"),
        ("empty row", "output 1: error inf"),
        ("race", "output 0 depends on what its memory held before, or on chance"),
    ],
)
def test_checks_find_faults(fault, problem):
    case = Broken(**dataclasses.asdict(DECODE), fault=fault)
    result = checks.check(case, seed=3, implementation="interpret")
    assert result["passed"] == (problem is None), result
    assert problem is None or result["problems"][0].startswith(problem)
    assert result["outputs"] == 2


def test_memory_is_poisoned_with_two_numbers_before_the_kernel_runs(monkeypatch):
    fills, scribbles = [], []
    fill, scribble = arrays.filled_like, arrays.scribble
    monkeypatch.setattr(
        arrays, "filled_like", lambda x, value: fills.append(value) or fill(x, value)
    )
    monkeypatch.setattr(
        arrays, "scribble", lambda n, value: scribbles.append(value) or scribble(n, value)
    )
    result = checks.check(DECODE, seed=3, implementation="interpret")
    assert result["outputs_in_poisoned_buffers"] == 2
    assert math.isnan(fills[0])
    assert fills[1] > 1e4
    np.testing.assert_array_equal(scribbles, fills)


def test_packed_caches_are_checked_as_they_are():
    case = PackedDecodeCase(bits=2, lengths=(70, 0), slots=128, dtype="float32", **SMALL)
    result = checks.check(case, seed=3, implementation="interpret")
    assert result["passed"], result
    assert block_sweep.candidates(case, gpu=H200)[0] == case.block_sizes(gpu=H200)
    assert {x.block_kv for x in block_sweep.candidates(case, gpu=H200)} == {16, 32}
    with pytest.raises(rivals.UnsuitableError, match="packed"):
        rivals.equivalent(case, arrays.draw(case, 0))


def test_an_output_outside_its_poisoned_buffer_fails():
    programs = checks.compiled(DECODE, "interpret")
    shapes = DECODE.shapes()

    def kernel(_, *arguments):
        return DECODE.run(*arguments, implementation="interpret")

    keeping = jax.jit(kernel, keep_unused=True).lower(programs.outputs, *shapes).compile()
    assert checks.run(DECODE, programs, seed=3)["passed"]
    result = checks.run(DECODE, dataclasses.replace(programs, kernel=keeping), seed=3)
    assert not result["passed"]
    assert result["outputs_in_poisoned_buffers"] == 0
    assert result["problems"] == [
        f"output {i} did not take the place of its poisoned buffer" for i in range(2)
    ]


def test_drawn_numbers_are_fresh_and_integers_are_the_cases_own():
    first, second = arrays.draw(DECODE, 1), arrays.draw(DECODE, 2)
    assert not jnp.array_equal(first[0], second[0])
    assert not jnp.array_equal(first[1], first[2])
    np.testing.assert_array_equal(first[3], [33, 0])


def test_pieces_of_a_long_prefill_are_parts_of_the_whole(monkeypatch):
    monkeypatch.setattr(references, "_MOST_PAIRS", 1)
    monkeypatch.setattr(references, "_QUERIES", 8)
    case = PrefillCase(offsets=(5,), length=40, slots=50, dtype="float32", **SMALL)
    arguments = arrays.draw(case, 0)
    whole = case.run(*arguments, implementation="xla")
    pieces = references.pieces(case)
    assert [piece.first for piece in pieces] == [0, 17, 32]
    for piece in pieces:
        part = piece.case.run(*piece.arguments(*arguments), implementation="xla")
        for one, all_of_it in zip(part, whole, strict=True):
            np.testing.assert_allclose(one, all_of_it[piece.rows], atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        DecodeCase(lengths=(33,), slots=40, dtype="float32", **SMALL),
        FullCase(length=20, batch=2, dtype="float32", **SMALL),
        PrefillCase(offsets=(0,), length=20, slots=30, dtype="float32", **SMALL),
        StreamingCase(length=20, sink=0, recent=7, dtype="float32", **SMALL),
    ],
    ids=["decode", "full", "prefill", "streaming without sinks"],
)
def test_other_libraries_are_given_the_same_work(case):
    arguments = arrays.draw(case, 0)
    (call,) = rivals.equivalent(case, arguments).calls
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=case.softmax_scale,
        implementation="xla",
        **rivals.masking(call),
    )
    with jax.numpy_rank_promotion("allow"):
        theirs = attend(call.q, call.k, call.v)
    ours = case.run(*arguments, implementation="xla")[0]
    np.testing.assert_allclose(theirs.reshape(ours.shape), ours, atol=1e-5)


def test_a_chunk_behind_a_past_is_two_calls_of_theirs():
    case = PrefillCase(offsets=(30,), length=10, slots=64, **SMALL)
    work = rivals.equivalent(case, arrays.draw(case, 0))
    assert [(call.k.shape[1], call.causal) for call in work.calls] == [(10, True), (30, False)]
    assert "not merged" in work.note
    with pytest.raises(rivals.UnsuitableError, match="different lengths"):
        rivals.equivalent(DECODE, arrays.draw(DECODE, 0))


@pytest.mark.parametrize("op", ["decode", "full", "merge", "prefill", "streaming"])
def test_tile_sizes_to_try_begin_with_the_ops_own_and_differ(op):
    for case in real().timed[op].values():
        found = block_sweep.candidates(case, gpu=H200)
        assert found[0] == case.block_sizes(gpu=H200)
        assert len(set(found)) == len(found) >= 10


def test_floors_of_the_published_models_are_those_of_the_published_points():
    # SPEC sections 5 and 6.
    for published, heads, of_decode, of_prefill in (
        (models.LLAMA_2_7B, 256, 2.70, 1.99),
        (models.LLAMA_3_8B, 128, 1.69, 1.75),
    ):
        assert sum(published.retrieval_heads) == heads
        duo, full = (variant.config for variant in published.variants)
        read = functools.partial(
            floors.decode_bytes, published.model, context=published.contexts[0], itemsize=2
        )
        ratio = (
            read(full.retrieval_heads, ring_slots=384)["step"]
            / read(duo.retrieval_heads, ring_slots=384)["step"]
        )
        assert ratio == pytest.approx(of_decode, abs=0.02)
        multiply = functools.partial(
            floors.prefill_flops,
            published.model,
            length=published.prompt,
            sink_size=128,
            recent_size=256,
        )
        ratio = multiply(full.retrieval_heads)["all"] / multiply(duo.retrieval_heads)["all"]
        assert ratio == pytest.approx(of_prefill, abs=0.02)


def test_random_parameters_are_in_serving_form():
    model = smoke().models[0].model
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


def test_a_table_records_failures_and_what_the_time_did_not_reach(tmp_path):
    table = new_table(tmp_path)
    assert table.attempt("bad", lambda: 1 // 0) is None
    assert table.attempt("good", lambda: 7) == 7
    table.add(name="row", value=1)
    on_disk = json.loads((tmp_path / "some.json").read_text())
    assert on_disk["rows"][0]["failed"].startswith("ZeroDivisionError: ")
    assert on_disk["rows"][1] == {"name": "row", "value": 1}
    assert on_disk["gpu"] == "none"

    late = new_table(tmp_path, seconds=-1)
    assert list(late.in_time([("a", 1), ("b", 2)])) == []
    assert late.not_reached == ["a", "b"]


def test_time_that_a_stage_leaves_is_there_for_the_next(tmp_path):
    left = {}

    def stage(name, share):
        return Stage(name=name, share=share, run=lambda table: left.update({name: table.time_left}))

    stages = [stage("first", 0.25), stage("second", 0.75)]
    began = time.monotonic()
    tables.run(stages, {}, folder=tmp_path, header={}, began=began, seconds=1000)
    assert left["first"] == pytest.approx(250, abs=50)  # a busy machine takes seconds
    assert left["second"] == pytest.approx(1000, abs=50)


def test_targets_are_judged_by_what_was_measured(tmp_path):
    kernels, serving = new_table(tmp_path), new_table(tmp_path)

    def add(op, name, seconds, num_bytes=2e9, copy=0.9, **row):
        ceiling = {"copy": copy, "matmul": 0.5}
        kernels.add(
            name=f"{op}: {name}", op=op, seconds={"median": seconds}, bytes=num_bytes,
            of_ceiling=ceiling, **row,
        )  # fmt: skip

    add("decode", "long", 1.0, copy=0.86)
    add("decode", "longer", 1.0, copy=0.84)
    add("decode", "a ring", 1.0, num_bytes=1e6, copy=0.1)
    add("prefill", FULL_32K, 1.0, rivals={"jax.nn cudnn": {"ours_is_faster_by": 0.7}})
    add("streaming", STREAMING_32K, 0.05)
    add("decode", DECODE_500K, 0.006, num_bytes=1e6)
    add("decode_packed", packed_name(4), 0.003, num_bytes=4e5)
    headline = {"model": models.LLAMA_2_7B.name, "name": "duo", "floor_speedup": 2.7}
    serving.add(what="decode", **headline, context=100_000, speedup=9.0)
    serving.add(what="decode", **headline, context=134_000, speedup=2.6)
    found = {"kernels": kernels, "serving": serving}

    def judged(hardware):
        return [(target.status, target.value) for target in targets.judge(found, hardware=hardware)]

    assert judged("NVIDIA A100-SXM4-80GB")[:6] == [
        ("not met", 0.84),
        ("not met", 0.7),
        ("met", 20.0),
        ("not met", 2.0),
        ("met", 2.6),
        ("met", 2.6 / 2.7),
    ]
    assert judged("NVIDIA H200")[1] == ("reported", 0.7)
    assert set(judged("NVIDIA H200")[6:]) == {("not measured", None)}
