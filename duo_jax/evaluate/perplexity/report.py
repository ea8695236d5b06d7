"""The report of perplexity by position: JSON, tables and a picture."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax import files
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import figures, markdown, statistics

Values = Float[np.ndarray, "texts buckets"]


def write(folder: pathlib.Path, name: str, result: dict[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.png into a folder, and print the tables."""
    text = to_markdown(result)
    files.write_text(folder / f"{name}.json", to_json(result))
    files.write_text(folder / f"{name}.md", text + "\n")
    files.write_bytes(folder / f"{name}.png", png(result))
    print(text)
    print(f"written: {folder / name}.json, .md, .png")


def to_markdown(result: Mapping[str, Any]) -> str:
    """Write a table of every setting, and one of differences from the first, text by text.

    Behind ± stand two standard errors over texts.
    """
    names, settings = _buckets(result), _settings(result)
    lines = []
    for setting, values in settings.items():
        every = _over_tokens(result, values)
        megabytes = max(r["cache_bytes"] for r in result["rows"] if r["setting"] == setting) / 1e6
        means = [statistics.nats(column) for column in values.T]
        perplexity = f"{np.exp(np.mean(every)):.2f}"
        lines.append((setting, *means, statistics.nats(every), perplexity, f"{megabytes:,.2f}"))
    found = markdown.table(("NLL, nats per token", *names, "all", "perplexity", "cache MB"), lines)
    first, *others = settings
    if others:
        changes = [
            (setting, *map(_change, (settings[setting] - settings[first]).T),
             _change(_over_tokens(result, settings[setting] - settings[first])))
            for setting in others
        ]  # fmt: skip
        found += "\n\n" + markdown.table((f"minus {first}", *names, "all"), changes)
    return found


def by_text(result: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " texts"]]:
    """Return the mean over the tokens of each text, by setting."""
    settings = _settings(result)
    return {setting: _over_tokens(result, values) for setting, values in settings.items()}


def png(result: Mapping[str, Any]) -> bytes:
    """Draw NLL by position, and the differences from the first setting; return a PNG."""
    names, settings = _buckets(result), _settings(result)
    first = next(iter(settings))
    panels = [("NLL, nats per token", settings)]
    others = {s: values - settings[first] for s, values in settings.items() if s != first}
    if others:
        panels.append((f"NLL minus that of {first}", others))
    figure, axes = figures.new_figure(
        5.6 * len(panels) + 2.4, 4.6, ncols=len(panels), squeeze=False
    )
    places = np.arange(len(names))
    for panel, (label, curves) in zip(axes[0], panels, strict=True):
        for number, (setting, values) in enumerate(settings.items()):
            if setting not in curves:
                continue
            values = curves[setting]
            panel.errorbar(
                places + 0.04 * (number - len(settings) / 2),
                values.mean(axis=0),
                yerr=[2 * statistics.standard_error(column) for column in values.T],
                marker="o",
                markersize=4,
                capsize=2,
                color=f"C{number}",
                label=setting,
            )
        panel.set_xticks(places, names, rotation=30, fontsize=8)
        panel.set_xlabel("tokens before")
        panel.set_ylabel(f"{label} (± 2 standard errors)", fontsize=9)
        panel.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
    figure.suptitle(
        f"{result['model']}: {result['samples']} texts of {result['length']:,} tokens\n"
        f"{in_words(result)}",
        fontsize=10,
    )
    return figures.png(figure, dpi=110)


def in_words(result: Mapping[str, Any]) -> str:
    """Return the settings that all rows share, in one line."""
    return (
        f"sink {result['sink']}, recent {result['recent']}; {result['dtype']}; chunks of "
        f"{result['prefill_chunk']:,}, mode {result['prefill_mode']}"
    )


def _buckets(result: Mapping[str, Any]) -> list[str]:
    bounds = result["bounds"]
    pairs = itertools.pairwise(bounds)
    return [f"{start:,} to {stop - 1:,}" for start, stop in pairs]


def _settings(result: Mapping[str, Any]) -> dict[str, Values]:
    """Return the values of each setting, texts in order."""
    found: dict[str, list[list[float]]] = {}
    for row in result["rows"]:
        found.setdefault(row["setting"], []).append(row["nll"])
    return {setting: np.array(values) for setting, values in found.items()}


def _over_tokens(result: Mapping[str, Any], values: Values) -> Float[np.ndarray, " texts"]:
    """Return the mean over the tokens of each text."""
    return np.average(values, axis=1, weights=np.diff(result["bounds"]))


def _change(values: Float[np.ndarray, " texts"]) -> str:
    return statistics.change(values)
