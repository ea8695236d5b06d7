"""The pages' numbers are those of the committed result files, and these meet their bars."""

import json
import pathlib
from typing import get_args

import numpy as np
import pytest

from benchmarks import (
    budgets,
    gpu_table,
    identify,
    logits_error,
    mesh_budgets,
    quantised,
    results_page,
)
from benchmarks.contenders.report import REPORT as REAL_SPEED
from benchmarks.quality import head_choices_report, head_tasks_report, published
from benchmarks.real import page as real_page
from benchmarks.real_model import RealModelFlags
from benchmarks.serving import report as serving_report
from duo_jax.cache import KVFormat
from duo_jax.evaluate.compare import report as compare_report
from duo_jax.evaluate.compare.points import points
from duo_jax.heads.pattern import choose_retrieval_heads, load_pattern
from duo_jax.reports.statistics import standard_error
from train.identify import report

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


def test_demo_table_is_that_of_the_committed_run():
    results = json.loads((ROOT / "docs/demo/report.json").read_text())
    markdown = report.to_markdown(results)
    assert markdown == (ROOT / "docs/demo/report.md").read_text(encoding="utf-8")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 10
    assert "\n".join(table) in page("identify")


def test_reconstruction_on_a_real_model_is_that_of_the_committed_reports():
    shown = {
        ("reconstruct", "reconstructing"): "reconstruct, 4 texts",
        ("identify", "learned"): "budget, 100 steps (the pattern that ships)",
        ("identify", "random"): "random, mean of 5",
    }
    for (folder, heads), label in shown.items():
        results = json.loads((RESULTS / "smollm2" / folder / "report.json").read_text())
        assert results["samples"] == {
            "count": 8,
            "passkeys": 32,
            "length": 1280,
            "haystack": "held-out text",
        }
        rows = [r for r in results["retrieval"] if r["heads"] == heads and r["sparsity"] > 0.25]
        assert len(rows) == 2
        for row in rows:
            exact = f"{row['accuracy']:.1%} ± {200 * row['accuracy_error']:.1f}"
            nll, kl = (f"{row[n]:.3f} ± {2 * row[n + '_error']:.3f}" for n in ("nll", "kl"))
            line = f"| {label} | {row['sparsity']:.0%} | {exact} | {nll} | {kl} |"
            assert line in page("identify")


def test_methods_are_compared_by_the_committed_choices_of_heads():
    """On the page by label, in README by sentence."""
    result = json.loads((RESULTS / "head_choices.json").read_text())
    found = {
        (number, line.heads, line.sparsity): f"{line.texts('nll').mean():.2f}"
        for number in (1, 4)
        for line in head_choices_report.lines(result, number, None)
    }
    labels = {
        "learned": "`budget`, 100 steps: the default | answers, trained",
        "attribute": "`attribute` | answers, 20 gradients",
        "profile": "`profile` | attention while answering",
        "reconstruct": "`reconstruct` | attention while repeating",
        "paper": "`optimise`, 100 steps: the paper's | final states, trained",
        "random": "random, 5 seeds | ",
    }
    for heads, label in labels.items():
        cells = [found[number, heads, sparsity] for number in (1, 4) for sparsity in (0.5, 0.75)]
        assert f"| {label} | {' | '.join(cells)} |".replace("  ", " ") in page("identify")
    for heads, sparsity in (("full attention", 0.0), ("all streaming", 1.0)):
        one, four = (found[number, heads, sparsity] for number in (1, 4))
        assert f"| {heads} | | {one} | | {four} | |" in page("identify")
    words = {
        "attribute": "attribution",
        "profile": "attention profile",
        "reconstruct": "KVzip's score",
        "paper": "the paper's loss",
        "random": "random",
    }
    others = ", ".join(f"{word} {found[1, heads, 0.75]}" for heads, word in words.items())
    full, learned = found[1, "full attention", 0.0], found[1, "learned", 0.75]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"costs {learned} nats (full caches {full}; {others};" in readme


def by_choice(
    result: dict, number: int, length: int
) -> dict[tuple[str, float], head_choices_report.Line]:
    """Return the lines of a table at one length, by heads and sparsity."""
    lines = head_choices_report.lines(result, number, length)
    return {(line.heads, line.sparsity): line for line in lines}


def nll_and_exact(line: head_choices_report.Line) -> str:
    return f"{line.texts('nll').mean():.2f} ({line.texts('exact').mean():.0%})"


def test_choices_for_a_target_are_those_of_the_committed_run():
    result = json.loads((RESULTS / "smollm2/targets.json").read_text())
    lines = by_choice(result, 1, 1024)

    def cell(heads: str, sparsity: float) -> str:
        return nll_and_exact(lines[heads, sparsity])

    labels = {
        "learned": "`budget`, for 75%: ships",
        "profile": "`profile`",
        "reconstruct": "`reconstruct`",
        "attribute-50": "`attribute`, for 50%",
        "attribute-75": "`attribute`, for 75%",
        "attribute-87.5": "`attribute`, for 87.5%",
        "attribute-one-key": "`attribute`, for 75%, samples with one passkey",
        "masks": "`masks`, for 75%",
    }
    assert set(labels) < set(result["choices"])
    for heads, label in labels.items():
        cells = " | ".join(cell(heads, sparsity) for sparsity in (0.5, 0.75, 0.875))
        assert f"| {label} | {cells} |" in page("identify")
    full, none = cell("full attention", 0.0), cell("all streaming", 1.0)
    assert f"full caches {full}, all streaming {none}" in " ".join(page("identify").split())


def test_what_samples_ask_is_told_with_the_numbers_of_the_committed_run():
    result = json.loads((RESULTS / "smollm2/samples.json").read_text())
    lines = {number: by_choice(result, number, 1024) for number in (1, 4)}

    def cell(number: int, heads: str, sparsity: float) -> str:
        return nll_and_exact(lines[number][heads, sparsity])

    full = (cell(number, "full attention", 0.0) for number in (1, 4))
    assert "| full attention | {} | | | {} | | |".format(*full) in page("identify")
    budget, attribute = "`budget`, 100 steps", "`attribute`, 20 gradients"
    labels = {
        "budget-4": f"{budget}, 4 passkeys: ships",
        "budget-1": f"{budget}, 1 passkey",
        "attribute-4": f"{attribute}, 4 passkeys",
        "attribute-1": f"{attribute}, 1 passkey",
        "attribute-1-to-4": f"{attribute}, 1 to 4 passkeys",
        "attribute-1-to-4-equal": "`attribute`, 40 gradients, 1 to 4 passkeys",
    }
    for heads, label in labels.items():
        cells = [cell(n, heads, sparsity) for n in (1, 4) for sparsity in (0.5, 0.75, 0.875)]
        assert f"| {label} | {' | '.join(cells)} |" in page("identify")
    told = " ".join(page("identify").split())
    for number, sparsity, words in (
        (1, 0.75, "0.033 ± 0.022 nats better at 75% with one passkey"),
        (4, 0.75, "0.022 ± 0.017 with four"),
        (1, 0.5, "0.008 ± 0.013 worse"),
        (4, 0.5, "0.013 ± 0.012 better"),
    ):
        ours, ships = (lines[number][x, sparsity].texts("nll") for x in ("attribute-1", "budget-4"))
        change, error = ours - ships, 2 * standard_error(ours - ships)
        assert words.startswith(f"{abs(change.mean()):.3f} ± {error:.3f}")
        assert ("worse" in words) == (change.mean() > 0)
        assert words in told
    longer = json.loads((RESULTS / "smollm2/samples-4096.json").read_text())
    for number, words in (
        (
            1,
            "one passkey costs {} nats with attribution from one, {} from one to four, and {} with",
        ),
        (4, "four passkeys {}, {} and {} ({})"),
    ):
        found = {
            heads: line.texts("nll").mean()
            for (heads, _), line in by_choice(longer, number, 4096).items()
        }
        names = ("attribute-1", "attribute-1-to-4", "budget-4", "full attention")
        assert words.format(*(f"{found[name]:.2f}" for name in names)) in told


def test_forty_gradients_are_compared_with_what_ships_in_eight_cells():
    told = " ".join(page("identify").split())
    ahead, texts = 0, []
    for name, length in (("samples", 1024), ("samples-4096", 4096)):
        result = json.loads((RESULTS / f"smollm2/{name}.json").read_text())
        for number in (1, 4):
            lines = by_choice(result, number, length)
            for sparsity in result["settings"]["sparsities"]:
                ours = lines["attribute-1-to-4-equal", sparsity].texts("nll")
                change = ours - lines["budget-4", sparsity].texts("nll")
                error = 2 * standard_error(change)
                ahead += change.mean() < -error
                assert change.mean() < error  # behind in none
                if length == 4096:
                    texts.append((ours, f"{-change.mean():.3f} ± {error:.3f}"))
    assert ahead == 5
    (one, by_one), (four, by_four) = texts
    assert f"{one.mean():.2f} nats with one passkey and {four.mean():.2f} with four, " in told
    assert f"{by_one} and {by_four} better than what ships" in told
    assert "it is ahead of what ships in five by more than the errors, and behind in none" in told
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "better in five of eight cells, within the errors as well in three" in readme


def test_choices_by_task_are_those_of_the_committed_run():
    result = json.loads((RESULTS / "smollm2/tasks.json").read_text())
    found = head_tasks_report.by_choice(result)
    assert result["choices"] == ["budget", "attribute", "budget-1-to-4"]
    for other in (("", head_tasks_report.FULL), ("budget", "")):
        for line in head_tasks_report.differences(found, other).splitlines():
            assert line in page("identify")
    told = " ".join(page("identify").split())
    full, ours, ships = (
        found[choice]
        for choice in (
            ("", head_tasks_report.FULL),
            ("attribute", "75% streaming"),
            ("budget", "75% streaming"),
        )
    )
    for task, words in (
        ("needle", "one needle {} (`budget` {}, full caches {})"),
        ("passkeys-1", "one passkey {} ({}, {})"),
        ("passkeys-4", "four {} ({}, {})"),
        ("niah_single_1", "niah_single_1 {} of 22 questions ({}, {})"),
    ):
        exact = (f"{scores[task, 'exact'].mean():.0%}" for scores in (ours, ships, full))
        assert words.format(*exact) in told
    assert ours["niah_single_1", "exact"].size == 22
    mixed = found["budget-1-to-4", "75% streaming"]["needle", "exact"].mean()
    assert f"ahead with one needle (exact {mixed:.0%})" in told


def test_heads_that_two_losses_choose_are_counted_from_the_committed_patterns():
    def shared(one: pathlib.Path, other: pathlib.Path, sparsity: float) -> int:
        first, second = (
            choose_retrieval_heads(load_pattern(folder).gates, sparsity=sparsity)
            for folder in (one, other)
        )
        return int((first & second).sum())

    divergence, likelihood, mixed = (
        RESULTS / f"smollm2/{name}/pattern"
        for name in ("attribute-divergence", "attribute-votes", "budget-mixed")
    )
    ships = ROOT / "duo_jax/patterns/SmolLM2-135M-Instruct"
    assert shared(divergence, likelihood, 0.75) == 20
    assert shared(divergence, likelihood, 0.5) == 40
    assert (shared(divergence, ships, 0.75), shared(divergence, ships, 0.5)) == (16, 37)
    assert shared(mixed, ships, 0.75) == 19
    told = " ".join(page("identify").split())
    assert "keeps 20 of the 22 heads that the likelihood keeps at 75%, and 40 of 45 at 50%" in told
    assert "with what ships it shares 16 and 37" in told
    assert "19 of their 22 heads are the same" in told


def test_the_frontier_of_a_real_model_is_told_with_the_numbers_of_its_page():
    section = page("results_smollm2").split("## Split, format and eviction together")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = {name: rest for name, *rest in ([c.strip() for c in x.split("|")[1:]] for x in lines)}
    together, full = rows["75% streaming, int8, 25% of tokens"], rows["full caches"]
    exact = [row[1].split(" ")[0] for row in (together, full)]
    told = " ".join(page("evaluate").split())
    assert (
        f"at {together[0]} of their bytes ({together[2]} nats per token, full {full[2]}; "
        f"exact {exact[0]}, full {exact[1]})." in told
    )
    enough, alone = rows["50% streaming, 25% of tokens"][0], rows["int4"][0]
    assert f"{enough} are enough for the split and a quarter of the tokens" in told
    assert f"- minus int4 ({alone}): NLL -0.135 ± 0.023" in section
    assert f"alone only int4 ({alone}) fits in them, with 0.135 ± 0.023 nats more" in told


def test_reconstruction_on_the_demo_model_is_that_of_the_committed_report():
    results = json.loads((RESULTS / "reconstruct_demo/report.json").read_text())
    rows = {r["sparsity"]: r for r in results["retrieval"] if r["heads"] == "reconstructing"}
    assert rows[0.25]["accuracy"] == 1
    exact = f"{rows[0.5]['accuracy']:.1%} ± {200 * rows[0.5]['accuracy_error']:.1f}"
    assert f"with 50% exact retrieval is {exact}," in page("identify")


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
    results = json.loads((RESULTS / "identify.json").read_text())
    assert identify.to_markdown(results) in page("identify")
    assert max(results["settings"]["lengths"]) >= 4096


def test_memory_table_is_that_of_the_committed_run():
    result = json.loads((RESULTS / "budgets.json").read_text())
    assert budgets.to_markdown(result) in page("gpu")
    assert set(result["programs"]) == set(budgets.PROGRAMS)


def test_memory_table_of_eight_gpus_is_that_of_the_committed_run():
    result = json.loads((RESULTS / "mesh_budgets.json").read_text())
    assert mesh_budgets.to_markdown(result) in page("scale")
    assert set(result["programs"]) == set(mesh_budgets.PROGRAMS)


def test_the_number_of_compiled_cases_is_that_of_the_committed_run():
    result = json.loads((RESULTS / "compiled.json").read_text())
    cases = {(row["op"], row["case"]) for row in result["rows"]}
    assert f"in {len(cases)} cases" in page("gpu")


def test_gpu_table_is_that_of_the_committed_run_or_says_that_there_is_none():
    result = gpu_table.read(ROOT / gpu_table.TableFlags().result)
    assert gpu_table.to_markdown(result) in page("gpu")


def test_table_of_formats_is_that_of_the_committed_run():
    result = json.loads((RESULTS / "quantised.json").read_text())
    assert quantised.to_markdown(result) in page("formats")
    assert {row["kv"] for row in result["rows"]} == set(get_args(KVFormat))


@pytest.mark.slow
def test_table_of_weights_is_what_its_benchmark_finds():
    flags = logits_error.LogitsErrorFlags()
    errors = logits_error.by_weights(flags.model, flags.formats)
    found = [line.split("|") for line in logits_error.to_markdown(errors).splitlines()]
    table = page("formats").split("<!-- weights table -->")[1].split("<!-- end -->")[0]
    written = [line.split("|") for line in table.strip().splitlines()]
    assert [row[1] for row in written] == [row[1] for row in found]
    numbers = [
        [float(cell.strip(" %")) for row in rows[2:] for cell in row[2:4]]
        for rows in (written, found)
    ]
    # A processor that adds up in another order decides a tie of two tokens in 512 otherwise.
    np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.4)


@pytest.mark.parametrize("name", serving_report.REPORTS)
def test_serving_tables_are_those_of_the_committed_benchmarks(name):
    made_by = serving_report.REPORTS[name]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert made_by.to_markdown(made_by.longest(result)) in page("benchmarks")
    assert made_by.to_markdown(result) + "\n" == (RESULTS / f"{name}.md").read_text()
    benchmark = name.removesuffix("_kv")
    assert result["command"].startswith(f"python -m benchmarks.{benchmark}")


def test_table_of_a_real_model_is_that_of_the_committed_run_or_says_that_there_is_none():
    file = RESULTS / "real_speed.json"
    if not file.is_file():
        assert "No run is committed yet." in page("benchmarks")
        return
    result = json.loads(file.read_text())
    assert REAL_SPEED.to_markdown(result) in page("benchmarks")
    for length in {row["length"] for row in result["rows"]}:
        rows = {row["name"]: row for row in result["rows"] if row["length"] == length}
        # transformers reads 8,128 tokens faster than our full caches do, as the page says.
        for part, most in (("prefill_ratio", 1.15), ("decode_ratio", 1)):
            eager = [row.get(part, 0) for name, row in rows.items() if "transformers" in name]
            assert max(eager, default=0) <= most
            assert rows["duo 50%"][part] >= max(1, *eager)


def test_results_page_is_that_of_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    written = tmp_path / "results.md"
    results_page.write_page(results_page.PageFlags(out=written))
    assert written.read_text() == page("results")
    for name in published.LONGBENCH_METHODS:
        assert name in page("results").split("## Published by others")[1]


def test_page_of_the_real_model_is_that_of_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = RealModelFlags(model="M", pattern="P")
    written = tmp_path / "page.md"
    real_page.write(flags.results, written)
    assert written.read_text(encoding="utf-8") == page(flags.page.stem)


def test_comparison_meets_its_bars():
    result = json.loads((RESULTS / "compare.json").read_text())
    rows = {(r["task"], r["method"], r["budget"]): r for r in result["rows"] if not r["draw"]}
    for task in ("needle", "passkeys"):
        full = np.mean(rows[task, "full", 1.0]["exact"])
        duo = np.mean(rows[task, "duo", 0.5]["exact"])
        assert duo >= full - 0.02
        for method in ("all-streaming", "random heads"):
            assert np.mean(rows[task, method, 0.5]["exact"]) < duo - 0.3


def test_newer_methods_are_those_of_the_committed_comparison():
    result = json.loads((RESULTS / "compare_more.json").read_text())
    for method in ("KVzip", "ShadowKV", "ThinK", "CHAI"):
        cells = []
        for task in ("needle", "passkeys"):
            found = {(p.method, p.budget): p for p in points(result, task)}
            cells += [compare_report._cell(found[method, b], "exact") for b in (0.25, 0.5, 0.75)]
        assert f"| {' | '.join((method, *cells))} |" in page("evaluate")


def test_four_bit_caches_and_eight_bit_weights_lose_one_point_at_most():
    result = json.loads((RESULTS / "quantised.json").read_text())
    change = {(r["weights"], r["kv"]): r["change"] for r in result["rows"][1:]}
    assert min(change["model", "int4"], change["int8", "model"]) >= -0.01
