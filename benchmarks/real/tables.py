"""Tables and pictures of scores by length, of needles, passkeys and RULER."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from duo_jax.evaluate.results import describe
from duo_jax.reports import figures, markdown, statistics

Found = Mapping[str, Mapping[str, Any]]
# By setting and length, the mean of each text.
Texts = dict[str, dict[int, np.ndarray]]


def by_length(found: Found, score: str) -> Texts:
    """Return the scores of texts; one with several passkeys counts once, by their mean."""
    values: dict[str, dict[int, dict[tuple[Any, ...], list[float]]]] = {}
    for entry in found.values():
        sampled = entry["result"]["sampled"]
        for row in entry["result"]["rows"]:
            text = (row["sample"],) if sampled == "length" else (row["sample"], row["depth"])
            lengths = values.setdefault(entry["row"], {})
            lengths.setdefault(row["length"], {}).setdefault(text, []).append(row[score])
    return {
        setting: {
            length: np.array([np.mean(scores) for scores in texts.values()])
            for length, texts in sorted(lengths.items())
        }
        for setting, lengths in values.items()
    }


def to_markdown(title: str, texts: Texts, write: Callable[[np.ndarray], str]) -> str:
    """Write a row per setting and a column per length; "-" where nothing was measured."""
    lengths = sorted({length for values in texts.values() for length in values})
    most = {
        length: max(values[length].size for values in texts.values() if length in values)
        for length in lengths
    }
    return markdown.table(
        (title, *(f"{length:,} tokens ({most[length]} texts)" for length in lengths)),
        [
            (setting, *(write(values[n]) if n in values else "-" for n in lengths))
            for setting, values in texts.items()
        ],
    )


def png_by_length(found: Found) -> bytes:
    """Draw exact retrieval and likelihood of answers by length."""
    figure, axes = figures.new_figure(11.0, 4.2, ncols=2)
    scores = {"exact": "exact retrieval", "nll": "answer NLL, nats per token"}
    for panel, (score, words) in zip(axes, scores.items(), strict=True):
        for number, (setting, lengths) in enumerate(by_length(found, score).items()):
            panel.errorbar(
                [length * 1.02 ** (number - 1) for length in lengths],
                [np.mean(values) for values in lengths.values()],
                yerr=[2 * statistics.standard_error(values) for values in lengths.values()],
                marker="o",
                markersize=4,
                capsize=2,
                label=setting,
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set_xlabel("text (tokens)")
        panel.set_ylabel(f"{words} (± 2 standard errors)", fontsize=9)
        panel.grid(alpha=0.3)
    axes[0].set_ylim(-0.05, 1.05)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
    *_, last = found.values()
    result = last["result"]
    figure.suptitle(
        f"{result['model']}: {result['task']}\n{describe.in_words(result)}", fontsize=10
    )
    return figures.png(figure, dpi=110)
