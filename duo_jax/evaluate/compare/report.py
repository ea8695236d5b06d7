"""The report of a comparison: JSON, tables and a picture."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from duo_jax import files
from duo_jax.evaluate.compare import plot
from duo_jax.evaluate.compare.points import Point, differences, measured, points
from duo_jax.evaluate.results import describe
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import markdown, statistics

_SCORES = {
    "exact": "exact retrieval",
    "tokens": "tokens right",
    "nll": "answer NLL, nats per token",
    "kl": "KL from full caches, nats per token",
}
_NATS = ("nll", "kl")


def write(folder: pathlib.Path, name: str, result: dict[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.png into a folder, and print the tables."""
    text = to_markdown(result)
    files.write_text(folder / f"{name}.json", to_json(result))
    files.write_text(folder / f"{name}.md", text + "\n")
    files.write_bytes(folder / f"{name}.png", plot.png(result))
    print(text)
    print(f"written: {folder / name}.json, .md, .png")


def to_markdown(result: dict[str, Any]) -> str:
    """Write the settings, and for every task a table and the differences between duo and others."""
    parts = [
        f"{result['model']}, {describe.in_words(result)}; {result['samples']} texts of "
        f"{result['length']:,} tokens, seed {result['seed']}; {result['hardware']}, jax "
        f"{result['jax']}. Budgets are bytes of live key and value buffers, as a fraction of full "
        "caches; in brackets what a method takes. ± two standard errors over texts."
    ]
    for task, about in result["tasks"].items():
        parts.append(f"### {task}: {about['in_words']} ({about['haystack']})")
        for score in filter(functools.partial(measured, result), _SCORES):
            found = points(result, task, score)
            parts.append(_table(found, score))
            if score == "exact" and (lines := _on_host(result, task)):
                parts.append("\n".join(lines))
            if score != "tokens" and (lines := _compared(found, score)):
                parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _table(found: Sequence[Point], score: str) -> str:
    budgets = sorted({point.budget for point in found})
    methods = list(dict.fromkeys(point.method for point in found))
    by_place = {(point.method, point.budget): point for point in found}
    return markdown.table(
        [_SCORES[score], *(f"{100 * budget:g}%" for budget in budgets)],
        [
            [method, *(_cell(by_place.get((method, budget)), score) for budget in budgets)]
            for method in methods
        ],
    )


def _on_host(result: dict[str, Any], task: str) -> list[str]:
    """Return lines about methods that keep something in the memory of the host."""
    shares: dict[str, float] = {}
    for row in result["rows"]:
        if row["task"] == task and row.get("host_bytes"):
            share = row["host_bytes"] / row["full_bytes"]
            shares[row["method"]] = max(share, shares.get(row["method"], 0.0))
    return [
        f"- {method}: bytes on the device; the host holds {share:.1%} of full caches' bytes beside."
        for method, share in shares.items()
    ]


def _cell(point: Point | None, score: str) -> str:
    if point is None:
        return ""
    if not point.fits:
        return "does not fit"
    if point.mean is None:
        return "-"
    mean = _number(point.mean, score) + ("" if score in _NATS else "%")
    if point.spread is None:
        mean = _with_error(mean, point.error, score)
    else:
        lowest, highest = point.spread
        mean += f" ({_number(lowest, score)} to {_number(highest, score)})"
    return f"{mean} [{point.share:.1%}]"


def _compared(found: Sequence[Point], score: str) -> list[str]:
    """Return lines with the differences between duo and each other method, paired by text."""
    lines = []
    for other in dict.fromkeys(point.method for point in found):
        parts = [
            f"{_with_error(_number(change, score, '+'), error, score)} at {100 * budget:g}%"
            for budget, change, error in differences(found, "duo", other)
        ]
        if parts:
            unit = "nats" if score in _NATS else "points"
            lines.append(f"- duo minus {other}, {unit}: {', '.join(parts)}")
    return lines


def _with_error(mean: str, error: float, score: str) -> str:
    """Write two standard errors behind a mean, where there are enough texts to know them."""
    digits, scale = (3, 2) if score in _NATS else (1, 200)
    return statistics.with_error(mean, scale * error, digits=digits)


def _number(value: float, score: str, sign: str = "") -> str:
    """Write nats as they are, fractions in per cent."""
    return f"{value:{sign}.3f}" if score in _NATS else f"{100 * value:{sign}.1f}"
