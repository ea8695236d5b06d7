"""Pictures of an identification run."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from duo_jax.heads.pattern import Pattern
from duo_jax.reports import figures

# Of the report's rows: what is drawn, and its axis.
_SCORES = {
    "accuracy": "exact retrieval",
    "nll": "answer NLL\n(nats per token)",
    "kl": "KL from full attention\n(nats per token)",
}
_ENDS = (0.0, 1.0)  # fractions of streaming heads that all choices share

# Labels of the loss axis, by the name of the objective in the metrics.
_OBJECTIVES = {
    "distillation": "distillation loss\n(mean squared error)",
    "divergence": "KL of the answers\n(nats per token)",
    "cross_entropy": "cross entropy\n(nats per token)",
}

# What the metrics say of the gates: its label, and its line.
_GATES = {
    "mean_gate": ("mean gate", "-C1"),
    "gates_above_half": ("fraction above 0.5", "--C2"),
}


def save_gates(
    pattern: Pattern, path: pathlib.Path, *, title: str, value: str = "gate (1: retrieval head)"
) -> None:
    """Draw the gates as a heat map, layers from left to right, KV heads from top to bottom.

    Args:
      pattern: the gates, or scores in their place.
      path: the picture to write.
      title: shown above it, with the mean gate and the streaming sizes.
      value: what a colour means.
    """
    gates = pattern.clipped()
    layers, heads = gates.shape
    width = min(14.0, max(5.0, 2.2 + 0.36 * layers))
    height = min(9.0, max(2.6, 1.5 + 0.36 * heads))
    figure, axes = figures.new_figure(width, height)
    image = axes.imshow(gates.T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=axes, label=value.replace(" (", "\n("))  # few heads, little height
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{title}: retrieval heads\nmean gate {gates.mean():.2f}, sink {pattern.sink_size}, "
        f"recent {pattern.recent_size}",
        fontsize=10,
    )
    if gates.size <= 64:
        for (layer, head), gate in np.ndenumerate(gates):
            colour = "white" if gate > 0.6 else "black"
            axes.text(layer, head, f"{gate:.2f}", ha="center", va="center", color=colour, size=8)
    figures.save(figure, path, dpi=150)


def save_history(
    metrics: Sequence[dict[str, Any]],
    path: pathlib.Path,
    *,
    title: str,
    turns: Sequence[str] = (),
) -> None:
    """Draw the loss without its penalty, and the gates, against the step.

    Lines of a damaged file may lack values, or all be lost: what there is is drawn.

    Args:
      metrics: of the steps, which are counted from 1.
      path: the picture to write.
      title: shown above it.
      turns: what successive steps learn from, by turns: each has a line of its own.
    """
    steps = [m["step"] for m in metrics]
    objective = next((name for name in _OBJECTIVES if any(name in m for m in metrics)), None)
    figure, (above, below) = figures.new_figure(7.0, 4.8, nrows=2, sharex=True)
    if objective is None:
        figures.no_values(above, "metrics")
        above.set_ylabel("loss")
    else:
        names = turns or (None,)
        for place, name in enumerate(names):
            shown = [m for m in metrics if (m["step"] - 1) % len(names) == place]
            losses = _values(shown, objective)
            above.plot([m["step"] for m in shown], losses, linewidth=1.0, label=name)
        if turns:
            above.legend()
        above.set_ylabel(_OBJECTIVES[objective])
    if objective in ("distillation", "divergence"):
        above.set_ylim(bottom=0)
    above.set_title(f"{title}: loss and gates", fontsize=10)
    for name, (label, style) in _GATES.items():
        if any(name in m for m in metrics):  # attribution has no fraction: all gates are equal
            below.plot(steps, _values(metrics, name), style, label=label)
    if below.lines:
        below.legend()
    else:
        figures.no_values(below, "metrics")
    below.set_ylim(-0.02, 1.02)
    below.set_ylabel("gates")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figures.save(figure, path, dpi=150)


def save_retrieval(rows: Sequence[dict[str, Any]], path: pathlib.Path, *, title: str) -> None:
    """Draw the report's scores against the fraction of streaming heads, a line per choice of heads.

    Args:
      rows: the report's "retrieval".
      path: the picture to write.
      title: shown above it.
    """
    figure, panels = figures.new_figure(11.0, 3.4, ncols=len(_SCORES))
    choices = dict.fromkeys(row["heads"] for row in rows if row["sparsity"] not in _ENDS)
    for axes, (score, label) in zip(panels, _SCORES.items(), strict=True):
        for choice in choices or ("all",):
            shown = [r for r in rows if r["heads"] == choice or r["sparsity"] in _ENDS]
            shown.sort(key=lambda row: row["sparsity"])
            axes.errorbar(
                [row["sparsity"] for row in shown],
                [row[score] or 0.0 for row in shown],  # the model has no divergence from itself
                yerr=[2 * (row[f"{score}_error"] or 0.0) for row in shown],
                marker="o",
                markersize=4,
                capsize=2,
                label=choice,
            )
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("streaming heads")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(alpha=0.3)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(-0.03, 1.05)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}: passkeys through fewer retrieval heads (± 2 standard errors)")
    figures.save(figure, path, dpi=150)


def _values(metrics: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Return a value of every step; nan, which is not drawn, where there is none."""
    values = [m.get(name) for m in metrics]
    return [float("nan") if value is None else float(value) for value in values]
