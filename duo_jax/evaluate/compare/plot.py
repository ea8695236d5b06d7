"""The picture of a comparison: accuracy against bytes, a panel per task."""

from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from duo_jax.evaluate.compare.points import Point, measured, points
from duo_jax.evaluate.results import describe
from duo_jax.reports import figures

# Solid lines: split heads. Dashed: evicted tokens. Dotted: smaller keys. Colours for the
# colour-blind too.
_STYLES = {
    "duo": {"color": "#0072B2", "marker": "o", "linewidth": 4, "zorder": 1.9},
    "profile heads": {"color": "#F0A000", "marker": "s"},
    "random heads": {"color": "#999999", "marker": "D"},
    "all-streaming": {"color": "#000000", "marker": "v"},
    "H2O": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "TOVA": {"color": "#CC79A7", "marker": "<", "linestyle": "--"},
    "SnapKV": {"color": "#009E73", "marker": ">", "linestyle": "--"},
    "FastGen": {"color": "#8B5A2B", "marker": "P", "linestyle": "--"},
    "HeadKV": {"color": "#7A4FBF", "marker": "X", "linestyle": "--"},
    "KVzip": {"color": "#56B4E9", "marker": "d", "linestyle": "--"},
    "ThinK": {"color": "#B8860B", "marker": "p", "linestyle": ":"},
    "ShadowKV": {"color": "#444477", "marker": "h", "linestyle": ":"},
    "CHAI": {"color": "#A0522D", "marker": "8", "linestyle": ":"},
}
_NAMES = {
    "duo": "DuoAttention (learned gates)",
    "profile heads": "heads by attention profile",
    "all-streaming": "all-streaming (StreamingLLM)",
}


_LABELS = {
    "exact": "exact retrieval (± 2 standard errors)",
    "nll": "answer NLL, nats per token (± 2 standard errors)",
}


def png(result: dict[str, Any]) -> bytes:
    """Draw scores against bytes, a column per task; return a PNG.

    The first row shows exact retrieval; a second one the answers' likelihood, where it was
    measured.
    """
    tasks, scores = result["tasks"], [score for score in _LABELS if measured(result, score)]
    figure, rows = figures.new_figure(
        4.6 * len(tasks) + 2.6,
        0.9 + 4.0 * len(scores),
        nrows=len(scores),
        ncols=len(tasks),
        sharey="row",
        squeeze=False,
    )
    for panels, score in zip(rows, scores, strict=True):
        for axes, (task, about) in zip(panels, tasks.items(), strict=True):
            found = points(result, task, score)
            for method in dict.fromkeys(point.method for point in found):
                _draw(axes, method, [point for point in found if point.method == method])
            axes.set_title("\n".join([task, *about["in_words"].split("; ")]), fontsize=9)
            axes.set_xlabel("KV bytes, measured, of full caches")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            if score == "exact":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                axes.set_ylim(-0.03, 1.05)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(_LABELS[score])
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
    figure.suptitle(
        f"{result['model']}: retrieval at equal bytes, {result['samples']} texts of "
        f"{result['length']:,} tokens\n{describe.in_words(result)}",
        fontsize=10,
    )
    return figures.png(figure, dpi=150)


def _draw(axes: Any, method: str, found: list[Point]) -> None:
    fitting = sorted((p for p in found if p.mean is not None), key=lambda point: point.budget)
    if not fitting:
        return
    if method == "full":
        label = "full caches"
        axes.axhline(fitting[0].mean, color="black", linewidth=1, linestyle=":", label=label)
        return
    shares = [point.share for point in fitting]
    means = np.array([point.mean for point in fitting], float)
    errors = np.array([2 * point.error for point in fitting])
    label = _NAMES.get(method, method)
    spreads = [point.spread for point in fitting if point.spread is not None]
    if spreads:
        errors = np.abs(np.array(spreads).T - means)
        label += " (mean, range)"
    style = {"markersize": 4.5, "linewidth": 1.5, "capsize": 2, "elinewidth": 0.8}
    axes.errorbar(shares, means, yerr=errors, label=label, **style | _STYLES[method])
