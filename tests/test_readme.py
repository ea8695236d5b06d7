"""The README tells the truth: its numbers are those of the committed result files."""

import json
import pathlib
import re
import shlex
from typing import get_args

import numpy as np
import pytest

from benchmarks import budgets, gpu_table, identify, quantised, results_page
from benchmarks.quality import published
from benchmarks.serving import decode_kv_report, decode_report, prefill_report, sweep
from duo_jax import generate
from duo_jax.cache import KVFormat
from duo_jax.heads.pattern import load_pattern
from train.identify import report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_demo_table_is_that_of_the_committed_run():
    results = json.loads((ROOT / "docs/demo/report.json").read_text())
    markdown = report.to_markdown(results)
    assert markdown == (ROOT / "docs/demo/report.md").read_text(encoding="utf-8")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 10
    assert "\n".join(table) in README


def test_demo_run_meets_its_bars():
    results = json.loads((ROOT / "docs/demo/report.json").read_text())
    rows = {(r["heads"], r["sparsity"]): r for r in results["retrieval"]}
    full = rows["all retrieval (the model itself)", 0.0]["accuracy"]
    learned, random = rows["learned", 0.5], rows["random", 0.5]
    assert learned["accuracy"] >= full - 0.02
    assert rows["all streaming", 1.0]["accuracy"] < 0.2
    assert random["runs"] == 5
    assert random["accuracy"] < learned["accuracy"] - 0.2


def test_committed_pattern_is_the_runs_own():
    pattern = load_pattern(ROOT / "docs/demo/pattern")
    results = json.loads((ROOT / "docs/demo/report.json").read_text())
    assert pattern.clipped().mean() == pytest.approx(results["gates"]["mean"])


def test_cost_table_is_that_of_the_committed_benchmark():
    results = json.loads((ROOT / "benchmarks/results/identify.json").read_text())
    assert identify.to_markdown(results) in README
    assert max(results["settings"]["lengths"]) >= 4096


def test_memory_table_is_that_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks/results/budgets.json").read_text())
    assert budgets.to_markdown(result) in README
    assert set(result["programs"]) == set(budgets.PROGRAMS)


def test_the_number_of_compiled_cases_is_that_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())
    cases = {(row["op"], row["case"]) for row in result["rows"]}
    assert f"in {len(cases)} cases" in README


def test_gpu_table_is_that_of_the_committed_run_or_says_that_there_is_none():
    result = gpu_table.read(ROOT / gpu_table.TableConfig().result)
    assert gpu_table.to_markdown(result) in README


def test_table_of_formats_is_that_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks/results/quantised.json").read_text())
    assert quantised.to_markdown(result) in README
    assert {row["kv"] for row in result["rows"]} == set(get_args(KVFormat))


@pytest.mark.parametrize(
    ("name", "made_by", "axis"),
    [
        ("decode", decode_report, "context"),
        ("decode_kv", decode_kv_report, "context"),
        ("prefill", prefill_report, "length"),
    ],
)
def test_serving_tables_are_those_of_the_committed_benchmarks(name, made_by, axis):
    results = ROOT / "benchmarks/results"
    result = json.loads((results / f"{name}.json").read_text())
    assert made_by.to_markdown(sweep.longest(result, axis)) in README
    assert made_by.to_markdown(result) + "\n" == (results / f"{name}.md").read_text()
    benchmark = name.removesuffix("_kv")
    assert result["command"].startswith(f"python -m benchmarks.{benchmark}")


def serve_examples() -> list[tuple[str, str]]:
    """Return the serve section's commands and what the README says they print."""
    part = README.split("<!-- serve example -->")[1].split("<!-- end -->")[0]
    blocks = re.findall(r"```\n\$ (.*?)\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 2
    return blocks


@pytest.mark.parametrize(("command", "printed"), serve_examples())
def test_serve_examples_print_what_the_readme_says(command, printed, capsys):
    python, minus_m, module, *args = shlex.split(command)
    assert (python, minus_m, module) == ("python", "-m", "duo_jax.generate")
    generate.main(args)
    captured = capsys.readouterr()

    def without_times(text: str) -> str:
        return re.sub(r"[\d.]+ (s|tokens/s)\b", r"_ \1", text)

    assert without_times(captured.out + captured.err) == without_times(printed)


@pytest.mark.parametrize("target", [word.split(")")[0] for word in README.split("](")[1:]])
def test_links_lead_somewhere(target):
    if not target.startswith(("http", "#")):
        assert (ROOT / target.split("#")[0]).exists()


def test_results_page_is_that_of_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "results.md"
    results_page.write_page(results_page.PageConfig(out=page))
    assert page.read_text() == (ROOT / "docs/results.md").read_text()
    for name in published.LONGBENCH_METHODS:
        assert name in page.read_text().split("## Published by others")[1]


def test_comparison_meets_its_bars():
    result = json.loads((ROOT / "benchmarks/results/compare.json").read_text())
    rows = {(r["task"], r["method"], r["budget"]): r for r in result["rows"] if not r["draw"]}
    for task in ("needle", "passkeys"):
        full = np.mean(rows[task, "full", 1.0]["exact"])
        duo = np.mean(rows[task, "duo", 0.5]["exact"])
        assert duo >= full - 0.02
        for method in ("all-streaming", "random heads"):
            assert np.mean(rows[task, method, 0.5]["exact"]) < duo - 0.3


def test_four_bit_caches_and_eight_bit_weights_lose_one_point_at_most():
    result = json.loads((ROOT / "benchmarks/results/quantised.json").read_text())
    change = {(r["weights"], r["kv"]): r["change"] for r in result["rows"][1:]}
    assert min(change["model", "int4"], change["int8", "model"]) >= -0.01
