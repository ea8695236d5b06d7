"""The report of a comparison: JSON, tables and a picture."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo_jax import files
from duo_jax.evaluate.compare import plot
from duo_jax.evaluate.compare.points import Point, differences, points
from duo_jax.evaluate.results import describe
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import markdown


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
        found = points(result, task)
        parts += [f"### {task}: {about['in_words']} ({about['haystack']})", _table(found)]
        lines = _compared(found)
        if lines:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _table(found: Sequence[Point]) -> str:
    budgets = sorted({point.budget for point in found})
    methods = list(dict.fromkeys(point.method for point in found))
    by_place = {(point.method, point.budget): point for point in found}
    return markdown.table(
        ["exact retrieval", *(f"{budget:.0%}" for budget in budgets)],
        [
            [method, *(_cell(by_place.get((method, budget))) for budget in budgets)]
            for method in methods
        ],
    )


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    if point.exact is None:
        return "does not fit"
    spread = f"± {200 * point.error:.1f}"
    if point.spread is not None:
        lowest, highest = point.spread
        spread = f"({100 * lowest:.1f} to {100 * highest:.1f})"
    return f"{point.exact:.1%} {spread} [{point.share:.1%}]"


def _compared(found: Sequence[Point]) -> list[str]:
    """Return lines with the differences between duo and each other method, paired by text."""
    lines = []
    for other in dict.fromkeys(point.method for point in found):
        parts = [
            f"{100 * np.mean(change):+.1f} ± {200 * error:.1f} at {budget:.0%}"
            for budget, change, error in differences(found, "duo", other)
        ]
        if parts:
            lines.append(f"- duo minus {other}, points: {', '.join(parts)}")
    return lines
