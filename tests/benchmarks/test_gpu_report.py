"""The GPU report runs to its end in miniature, and its judgements can fail."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_report
from benchmarks.gpu import block_sweep, models, mosaic, rivals, summary, tables, targets
from benchmarks.gpu.settings import DECODE_500K, FULL_32K, STREAMING_32K, packed_name, smoke
from benchmarks.gpu.tables import Stage
from kernels import dispatch
from tests.benchmarks.gpu_tables import new_table
from tests.processes import without_plugin_log


@pytest.mark.slow
def test_smoke_run_writes_every_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_report.main(gpu_report._parse(["--smoke"]), began=time.monotonic()) == 0
    out = capsys.readouterr().out
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu_report.STAGES
    }
    for name, table in found.items():
        assert table["smoke"] is True
        assert {"hardware", "jax", "jaxlib", "driver", "dtype", "prefill_mode"} <= table.keys()
        assert table["models"][0].keys() >= {"sink", "recent", "chunk", "contexts"}
        assert table["status"] == "complete", table
        assert table["rows"], name
        assert not any("failed" in row for row in table["rows"]), table
    # A lent machine gives back 8 files.
    assert len(list(tmp_path.iterdir())) <= 8

    assert all(row["passed"] for row in found["checks"]["rows"])
    assert found["checks"]["rows"][0]["outputs_in_poisoned_buffers"] > 0
    for row in found["kernels"]["rows"]:
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
        assert set(row["rivals"]) == set(rivals.TIMERS)
        assert row["mosaic"]["speedup"] == pytest.approx(
            row["seconds"]["median"] / row["mosaic"]["seconds"]["median"]
        )
    by_mosaic = [row["name"] for row in found["mosaic_checks"]["rows"]]
    assert by_mosaic == ["mosaic, streaming: odd length"]
    duo = [row for row in found["serving"]["rows"] if row["name"] == "duo"]
    duo.sort(key=lambda row: row["what"])
    assert [row.get("context", row.get("length")) for row in duo] == [64, 32, 32]
    assert all(row["speedup"] > 0 and row["floor_speedup"] > 1 for row in duo)
    params = models.param_bytes(smoke().models[0].architecture, "float32")
    assert duo[0]["memory"]["counted_bytes"] > duo[0]["cache_bytes"] + params
    judged = json.loads((tmp_path / "targets.json").read_text())["targets"]

    printed = out.splitlines()
    printed = printed[next(i for i, line in enumerate(printed) if line.startswith("SMOKE")) :]
    assert len(printed) <= 40
    assert "checks: 3 passed, 0 failed, 0 not reached" in out
    for bits, floor in ((8, 4488 / 1584), (4, 4488 / 1056), (2, 4488 / 693)):
        line = next(x for x in printed if f"500K, int{bits} KV: " in x)
        assert float(line.split("floor ")[1].split("x")[0]) == pytest.approx(floor, abs=0.01)
    for target, line in zip(judged, printed[-len(judged) :], strict=True):
        assert target["what"][:60] in line
        assert target["status"] in line


@pytest.mark.slow
def test_a_sweep_writes_the_best_of_what_it_tried(tmp_path):
    table = new_table(tmp_path)
    block_sweep.run(smoke(), table)
    assert [row["name"] for row in table.rows if row["name"].startswith("mosaic")] == [
        f"mosaic, prefill: {FULL_32K}"
    ]
    assert len(table.rows) == 7
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


@pytest.mark.slow
def test_a_real_run_needs_a_gpu_and_says_so():
    """As a command."""
    command = [sys.executable, "-m", "benchmarks.gpu_report"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert without_plugin_log(ran.stderr).startswith("error: jax runs on cpu here")


@pytest.mark.parametrize(
    "words",
    [
        ["--stages", "checks,nothing"],
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--ops", "decode,nothing"],
        ["--stages", "checks", "--part", "3/2"],
        ["--stages", "checks", "--part", "one"],
        ["--part", "1/2"],
    ],
)
def test_flags_that_mean_nothing_are_refused(words):
    with pytest.raises(SystemExit, match="2"):
        gpu_report._parse(words)


def test_cases_that_do_not_exist_are_refused(capsys):
    arguments = gpu_report._parse(["--smoke", "--cases", "500K,nothing"])
    assert len(smoke().of(arguments.ops, arguments.cases).timed_cases()) == 4
    words = ["--smoke", "--cases", "nothing"]
    assert gpu_report.main(gpu_report._parse(words), began=time.monotonic()) == 2
    assert "no case that is timed has nothing in its name" in capsys.readouterr().err


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


def test_a_stage_that_fails_does_not_lose_the_others(tmp_path):
    def fail(table):
        table.add(name="before")
        raise RuntimeError("out of memory")

    stages = [
        Stage(name="sweep", share=0.5, run=fail),
        Stage(name="checks", share=0.5, run=lambda table: table.add(name="after", passed=True)),
    ]
    found = {}
    began = time.monotonic()
    tables.run(stages, found, folder=tmp_path, header={}, began=began, seconds=100)
    failed, passed = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sweep", "checks")
    )
    assert (failed["status"], passed["status"]) == (
        "failed: RuntimeError: out of memory", "complete",
    )  # fmt: skip
    assert [row["name"] for row in failed["rows"] + passed["rows"]] == ["before", "after"]
    printed = summary.lines(found, targets.judge(found, hardware="A100"), title="some GPU")
    assert "stage sweep: failed: RuntimeError: out of memory, 1 rows" in printed
    assert "checks: 1 passed, 0 failed, 0 not reached (seed None)" in printed


def test_targets_are_judged_by_what_was_measured(tmp_path):
    kernels, serving = new_table(tmp_path), new_table(tmp_path)

    def add(op, name, seconds, num_bytes=2e9, copy=0.9, **row):
        ceiling = {"copy": copy, "matmul": 0.5}
        kernels.add(
            name=f"{op}: {name}", op=op, seconds={"median": seconds}, bytes=num_bytes,
            of_ceiling=ceiling, **row,
        )  # fmt: skip

    add("decode", "long", 1.0, copy=0.86, mosaic={"of_ceiling": {"copy": 0.93}})
    add("decode", "longer", 1.0, copy=0.84, mosaic={"of_ceiling": {"copy": 0.91}})
    add("decode", "a ring", 1.0, num_bytes=1e6, copy=0.1)
    add(
        "prefill", FULL_32K, 1.0, rivals={"jax.nn cudnn": {"ours_is_faster_by": 0.7}},
        mosaic={"flops_per_second": 4.4e14},
    )  # fmt: skip
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
    assert judged("NVIDIA H200")[4:6] == [("met", 0.91), ("not met", 440.0)]
    assert judged("NVIDIA H200")[6:8] == judged("NVIDIA A100-SXM4-80GB")[4:6]
    assert set(judged("NVIDIA H200")[8:]) == {("not measured", None)}


def test_auto_may_take_mosaic_for_what_is_faster_in_every_case_of_a_hopper():
    def timed(op, speedup):
        return {"name": f"{op}: case", "op": op, "mosaic": {"speedup": speedup}}

    rows = [timed("decode", 1.3), timed("decode", 1.1), timed("full", 1.3), timed("full", 1.01)]
    rows += [{"op": "merge", "mosaic": {"skipped": "no kernel"}}, {"name": "x", "failed": "y"}]
    result = {"smoke": False, "hardware": "NVIDIA H200, 16 cores", "rows": rows, "not_reached": []}
    result["status"] = "complete"
    right = {"name": "mosaic, decode: case", "passed": True}
    checks = {"rows": [right, {"name": "decode: case", "passed": False}], "not_reached": []}
    checks["status"] = "out of time"
    assert mosaic.faster_ops(result, checks) == {"decode"}
    others = [{"smoke": True}, {"hardware": "NVIDIA A100"}, {"status": "running"}]
    for other in (None, *({**result, **changed} for changed in others)):
        assert mosaic.faster_ops(other, checks) == set()
    failed = {"name": "decode: b", "op": "decode", "mosaic": {"failed": "illegal address"}}
    for more in (failed, {"name": "decode: b", "failed": "out of memory"}):
        assert mosaic.faster_ops({**result, "rows": [*rows, more]}, checks) == set()
    assert mosaic.faster_ops({**result, "not_reached": ["decode: b"]}, checks) == set()
    for wrong in ({"passed": False}, {"failed": "illegal address"}):
        of_mosaic = {"name": "mosaic, decode: b", **wrong}
        assert mosaic.faster_ops(result, {**checks, "rows": [right, of_mosaic]}) == set()
    assert mosaic.faster_ops(result, {**checks, "not_reached": ["mosaic, decode: b"]}) == set()


def test_auto_follows_the_committed_run():
    found = mosaic.faster_ops(mosaic.committed("kernels"), mosaic.committed("mosaic_checks"))
    assert found == dispatch.MOSAIC_IS_FASTER
