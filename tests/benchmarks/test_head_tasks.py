"""Choices of heads by task: what is run, how texts are paired, and what is shown."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import head_tasks
from benchmarks.quality import head_tasks_report as report
from benchmarks.real.steps import FULL, Step
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, save_pattern

pytestmark = pytest.mark.usefixtures("little_text")
SPLIT = "75% streaming"


def needle(row: str, nll: list[list[float]]) -> dict[Step, dict]:
    """Return a step for each of two lengths, texts at two depths."""
    return {
        Step(part="needle", name=f"needle-{length}-{row}", row=row, words=()): {
            "sampled": "cell",
            "rows": [
                {"sample": 0, "depth": depth, "length": length, "nll": value, "exact": 1.0}
                for depth, value in enumerate(values)
            ],
        }
        for length, values in zip((1024, 2048), nll, strict=True)
    }


def plain(row: str, nll: list[list[float]]) -> dict[Step, dict]:
    result = {
        "bounds": [1, 4, 5],  # three tokens and one
        "rows": [{"setting": row, "text": n, "nll": values} for n, values in enumerate(nll)],
    }
    return {Step(part="perplexity", name=f"perplexity-{row}", row=row, words=()): result}


def asked(row: str, right: float) -> dict[Step, dict]:
    result = {
        "results": {"niah_single_1": {"1024,none": right}},
        "n-samples": {"niah_single_1": {"effective": 4}},
    }
    return {Step(part="ruler", name=f"ruler-{row}", row=row, words=()): result}


@pytest.fixture
def result() -> dict:
    full = needle(FULL, [[1.0, 2.0], [3.0, 4.0]]) | plain(FULL, [[1.0, 5.0]] * 2) | asked(FULL, 1.0)
    found = {
        "first": full
        | needle(SPLIT, [[1.5, 2.5], [3.5, 4.5]])
        | plain(SPLIT, [[1.0, 5.0], [2.0, 6.0]])
        | asked(SPLIT, 0.75),
        "second": full
        | needle(SPLIT, [[1.5, 2.5], [3.5, 6.5]])
        | plain(SPLIT, [[1.0, 5.0]] * 2)
        | asked(SPLIT, 0.5),
    }
    return {
        "rows": list(report.rows(found)),
        "choices": list(found),
        "settings": {"lengths": [1024, 2048], "perplexity_length": 5},
        **{"model": "M", "dtype": "float32", "sink": 4, "recent": 12},
        **{"hardware": ["a CPU"], "jax": ["0.10"]},
    }


def test_texts_are_paired_with_those_of_full_caches_and_of_the_first_pattern(result):
    found = report.by_choice(result)
    assert list(found) == [("", FULL), ("first", SPLIT), ("second", SPLIT)]
    assert found["", FULL]["needle", "nll"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found["", FULL]["perplexity", "nll"].tolist() == [2.0, 2.0]  # the mean over four tokens
    text = report.to_markdown(result)
    # Of two texts, 0 and 1 nats: the mean is 0.5, its standard error 0.5. Of four, 0, 0, 0 and 2.
    assert "| first | 75% streaming | +0.500 ± 0.000 | +0.500 ± 1.000 |" in text
    assert "| second | 75% streaming | +0.500 ± 1.000 | -0.500 ± 1.000 |" in text
    assert "| all | full caches | 2.500 ± 1.291 | 100.0% ± 0.0 | 2.000 ± 0.000 |" in text
    assert text.count("75.0% ± 50.0") == 1
    assert "niah_single_1: exact" in text


def test_the_picture_has_a_panel_for_each_task_with_nats(result, tmp_path):
    report.write(result, tmp_path / "out.json")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out.md").read_text().startswith("# Choices of heads, by task, on M\n")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("learned",), "'learned' is not NAME=FOLDER"),
        (("a=b", "a=c"), "a name of its own, not a, a"),
        (("full caches=b",), "a name of its own, not full caches"),
        ((), "a name of its own"),
    ],
)
def test_patterns_need_names_of_their_own(patterns, message):
    with pytest.raises(InputError, match=message):
        head_tasks.HeadTasksFlags(model="M", patterns=patterns)


def flags(tiny, tmp_path, **changes) -> head_tasks.HeadTasksFlags:
    made = head_tasks.HeadTasksFlags(
        model=str(tiny),
        patterns=(f"first={tiny / 'pattern'}", f"second={tmp_path / 'second'}"),
        **{"sparsities": (0.5,), "lengths": (400,), "samples": (2,), "ruler_limits": ()},
        perplexity_length=300,
        work=tmp_path / "work",
        out=tmp_path / "results" / "tasks.json",
    )
    return dataclasses.replace(made, **changes)


def test_patterns_of_several_sizes_are_refused(tiny, tmp_path, started):
    gates = np.array([[0.1, 0.9, 0.2, 0.8]])
    save_pattern(Pattern(gates=gates, sink_size=4, recent_size=16), tmp_path / "second")
    with pytest.raises(InputError, match="several sizes of sink and recent"):
        head_tasks.main(flags(tiny, tmp_path))
    assert not started


@pytest.mark.slow
def test_full_caches_are_measured_once_for_all_patterns(tiny, tmp_path, started, capsys):
    gates = np.array([[0.1, 0.9, 0.2, 0.8]])
    save_pattern(Pattern(gates=gates, sink_size=4, recent_size=12), tmp_path / "second")
    head_tasks.main(flags(tiny, tmp_path))
    # Plain text, passkeys (4 and 1) and the needle: full caches once, and each pattern.
    assert [words[0] for words in started] == (
        ["perplexity"] * 2 + ["passkeys"] * 4 + ["needle"] * 2 + ["perplexity", *["passkeys"] * 2]
    ) + ["needle"]
    printed = capsys.readouterr().out
    assert printed.count("| second | 50% streaming |") == 3
    first = (tmp_path / "results/tasks.json").read_text()
    started.clear()
    head_tasks.main(flags(tiny, tmp_path))
    assert not started
    again = (tmp_path / "results/tasks.json").read_text()
    assert json.loads(again)["rows"] == json.loads(first)["rows"]
