"""The picture of a plan: memory against context, for all settings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.typing import LineStyleType

from duo_jax.plan.gpus import PlannedGpu
from duo_jax.plan.planner import PlanRow
from duo_jax.reports import figures

_COLOURS = {
    "model": "tab:red",
    "bf16": "tab:pink",
    "int8": "tab:orange",
    "int4": "tab:blue",
    "int2": "tab:green",
}  # by format of the caches
_STYLES: dict[str, LineStyleType] = {
    "model": "-",
    "int8": "--",
    "w8a8": "-.",
    "int4": ":",
}  # by format of the weights
_PANELS = {False: "full caches", True: "DuoAttention"}
_FIRST, _POINTS = 1_000, 300
_HEIGHT = 1.35  # of the memory axis, as a multiple of the budget


def png(rows: Sequence[PlanRow], gpu: PlannedGpu, *, title: str) -> bytes:
    """Draw a panel for full caches and one for split ones; return the file's bytes."""
    rows = [row for row in rows if row.estimate is not None]
    panels = sorted({row.setting.duo for row in rows})
    figure, (axes,) = figures.new_figure(
        1.5 + 5.5 * len(panels), 5.6, ncols=len(panels), sharey=True, squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    last = max(row.longest or _FIRST for row in rows)
    contexts = np.unique(np.geomspace(_FIRST, 2 * max(last, 2 * _FIRST), _POINTS).astype(int))
    for panel, duo in zip(axes, panels, strict=True):
        shown = [row for row in rows if row.setting.duo == duo]
        for row in shown:
            _draw(panel, row, contexts)
        panel.axhline(gpu.budget / 1e9, color="black", linewidth=1.2)
        panel.annotate(
            f"{gpu.name}: {gpu.budget / 1e9:.1f} GB",
            (contexts[0], gpu.budget / 1e9),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=9,
        )
        panel.set_title(_PANELS[duo], fontsize=10)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(_tokens))
        panel.set_xlim(contexts[0], contexts[-1])
        panel.set_ylim(0, _HEIGHT * gpu.budget / 1e9)
        panel.set_xlabel("context (tokens per row)")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("peak memory (GB)")
    figure.legend(handles=_legend(rows), loc="outside right center", fontsize=9, frameon=False)
    return figures.png(figure)


def _draw(panel: Any, row: PlanRow, contexts: np.ndarray) -> None:
    assert row.estimate is not None
    setting = row.setting
    gigabytes = [row.estimate.parts(int(context)).total / 1e9 for context in contexts]
    colour, style = _COLOURS[setting.kv], _STYLES[setting.weights]
    panel.plot(contexts, gigabytes, color=colour, linestyle=style, linewidth=1.6)
    if row.longest is not None and row.longest >= contexts[0]:
        peak = row.estimate.parts(row.longest).total / 1e9
        panel.plot([row.longest], [peak], color=colour, marker="o", markersize=4)


def _legend(rows: Sequence[PlanRow]) -> list[Line2D]:
    """Name colours and styles separately: one entry for every setting would fill the page."""
    caches = [kv for kv in _COLOURS if any(row.setting.kv == kv for row in rows)]
    styles = [name for name in _STYLES if any(row.setting.weights == name for row in rows)]
    return [
        *(Line2D([], [], color=_COLOURS[kv], label=f"KV {kv}") for kv in caches),
        *(Line2D([], [], color="grey", linestyle=_STYLES[w], label=f"weights {w}") for w in styles),
        Line2D([], [], color="black", linewidth=1.2, label="usable memory"),
        Line2D([], [], color="grey", marker="o", linestyle="", label="longest context"),
    ]


def _tokens(count: float, position: int | None = None) -> str:
    del position
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}K"
