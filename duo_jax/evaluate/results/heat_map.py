"""Scores by length and depth: as JSON, as a table, and as the well-known heat map."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax import files
from duo_jax.evaluate.results import describe, grid
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import figures, markdown, statistics

_SCORES = {"exact": "exact match", "recall": "word recall"}
_NAMES = {
    grid.FULL: "full caches",
    grid.DUO: "DuoAttention",
    grid.STREAMING: "all heads streaming",
}
_MOST_NUMBERED = 15  # with more lengths, cells show no numbers


def write(folder: pathlib.Path, name: str, result: dict[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.png into a folder, and print the table.

    Args:
      folder: where the files go.
      name: their name.
      result: `describe.settings`, "task", "seed", "samples" per "sampled" (a word), "lengths",
        "depths" and "rows", each with caches, length, depth, sample, the scores "exact" and
        "recall", and cache_bytes. Optional: in rows, "tokens", "nll" and "kl"; other names of the
        scores ("scores") and of the depth axis ("depth_label"), the text that each length was read
        from ("haystacks"), and what rows with other caches than those of `grid` are called
        ("labels").
    """
    table = to_markdown(result)
    files.write_text(folder / f"{name}.json", to_json(result))
    files.write_text(folder / f"{name}.md", table + "\n")
    files.write_bytes(folder / f"{name}.png", png(result))
    print(table)
    print(f"written: {folder / name}.json, .md, .png")


def to_markdown(result: dict[str, Any]) -> str:
    """Write the means over all texts, and the worst cell, of each kind of cache.

    Behind ± stand two standard errors over texts. Measures that rows of earlier versions lack are
    left out.
    """
    shown = {
        score: (words, write)
        for score, (words, write) in _measures(result).items()
        if any(row.get(score) is not None for row in result["rows"])
    }
    lines = []
    for caches in _measured(result):
        rows = _rows(result, caches)
        cells = table(result, caches, "recall")
        means = [_mean_in_words(result, rows, name, write) for name, (_, write) in shown.items()]
        lines.append(
            (
                _label(result, caches),
                np.isfinite(cells).sum(),
                *means,
                f"{np.nanmin(cells):.1%}",
                f"{max(row['cache_bytes'] for row in rows) / 1e6:,.2f}",
            )
        )
    names = (words for words, _ in shown.values())
    found = markdown.table(
        ("caches", "cells (length, depth)", *names, "worst cell", "cache MB, longest text"), lines
    )
    if "haystacks" in result:
        found += f"\n\nHaystack: {_haystacks(result)}."
    return found


def _measures(result: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[np.ndarray], str]]]:
    """Return, by the name in rows, what a measure is called and how its mean is written."""
    names = _score_names(result) | ({} if "scores" in result else {"tokens": "tokens right"})
    return {score: (words, statistics.percent) for score, words in names.items()} | {
        "nll": ("answer NLL (nats)", statistics.nats),
        "kl": ("KL from full (nats)", statistics.nats),
    }


def _mean_in_words(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    score: str,
    write: Callable[[np.ndarray], str],
) -> str:
    """Return a mean over texts, or a dash where a row lacks the score."""
    if any(row.get(score) is None for row in rows):
        return "-"
    place = ("length", "sample") if result["sampled"] == "length" else ("length", "depth", "sample")
    texts: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        texts.setdefault(tuple(row[name] for name in place), []).append(row[score])
    return write(np.array([np.mean(values) for values in texts.values()]))


def table(
    result: Mapping[str, Any], caches: str, score: str
) -> Float[np.ndarray, "depths lengths"]:
    """Return the mean score of every cell; nan where there is none."""
    lengths, depths = result["lengths"], result["depths"]
    cells: dict[tuple[int, int], list[float]] = {}
    for row in _rows(result, caches):
        at = (depths.index(row["depth"]), lengths.index(row["length"]))
        cells.setdefault(at, []).append(row[score])
    values = np.full((len(depths), len(lengths)), np.nan)
    for at, found in cells.items():
        values[at] = np.mean(found)
    return values


def png(result: dict[str, Any]) -> bytes:
    """Draw a column for each kind of cache and a row for each score."""
    measured = _measured(result)
    lengths, depths = result["lengths"], result["depths"]
    width, height = 1.0 + 0.4 * max(len(lengths), 8), 0.9 + 0.3 * max(len(depths), 5)
    figure, axes = figures.new_figure(
        0.8 + width * len(measured),
        1.0 + height * len(_SCORES),
        nrows=len(_SCORES),
        ncols=len(measured),
        squeeze=False,
    )
    figure.suptitle(
        f"{result['model']}, {result['task']}, texts per {result['sampled']}: {result['samples']}, "
        f"seed {result['seed']}\n{describe.in_words(result)}"
        + (f"\nhaystack: {_haystacks(result)}" if "haystacks" in result else ""),
        fontsize=10,
    )
    for panels, (score, words) in zip(axes, _score_names(result).items(), strict=True):
        for panel, caches in zip(panels, measured, strict=True):
            values = table(result, caches, score)
            panel.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            panel.set_title(
                f"{_label(result, caches)}: {words} {_mean(_rows(result, caches), score):.1%}",
                fontsize=9,
            )
            panel.set_xticks(
                range(len(lengths)), [_tokens(n) for n in lengths], rotation=45, fontsize=7
            )
            panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
            if len(lengths) <= _MOST_NUMBERED:
                _number(panel, values)
        panels[0].set_ylabel(result.get("depth_label", "depth of the needle"), fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("text (tokens)", fontsize=8)
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.ax.tick_params(labelsize=7)
    return figures.png(figure, dpi=110)


def _number(panel: Any, values: np.ndarray) -> None:
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if 0.15 < value < 0.85 else "white"
            text = f"{100 * value:.0f}"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)


def _score_names(result: Mapping[str, Any]) -> dict[str, str]:
    return _SCORES | result.get("scores", {})


def _measured(result: Mapping[str, Any]) -> list[str]:
    found = {row["caches"] for row in result["rows"]}
    return [caches for caches in result.get("labels", _NAMES) if caches in found]


def _rows(result: Mapping[str, Any], caches: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["caches"] == caches]


def _mean(rows: Sequence[Mapping[str, Any]], score: str) -> float:
    return float(np.mean([row[score] for row in rows]))


def _label(result: Mapping[str, Any], caches: str) -> str:
    if "labels" in result:
        return result["labels"][caches]
    if caches != grid.DUO:
        return _NAMES[caches]
    return f"{_NAMES[caches]}, {100 * result['sparsity']:g}% streaming"


def _haystacks(result: Mapping[str, Any]) -> str:
    """Return which lengths were read from which text."""
    lengths: dict[str, list[int]] = {}
    for length, name in zip(result["lengths"], result["haystacks"], strict=True):
        lengths.setdefault(name, []).append(length)
    return "; ".join(
        f"{name}, {_range(found[0], found[-1])} tokens" for name, found in lengths.items()
    )


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _tokens(count: int) -> str:
    return f"{count / 1e3:,.0f}K" if count >= 10_000 else f"{count:,}"
