"""Pictures of a run; none where matplotlib is not installed."""

import importlib.util
import pathlib
from typing import Any

from benchmarks.gpu.tables import Table


def draw(tables: dict[str, Table], folder: pathlib.Path, *, title: str) -> str:
    """Write report.png, a panel for each table there is; say what was done."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed"
    from duo_jax.reports import figures

    kernels, decoding = (
        [row for row in tables[name].rows if wanted in row] if name in tables else []
        for name, wanted in (("kernels", "of_ceiling"), ("serving", "ms"))
    )
    panels = [(_kernels, kernels)] * bool(kernels) + [(_decode, decoding)] * bool(decoding)
    if not panels:
        return "no picture: nothing was measured"
    heights = [max(3.0, 0.22 * len(rows)) if panel is _kernels else 5.0 for panel, rows in panels]
    figure, axes = figures.new_figure(
        9.0, sum(heights), nrows=len(panels), height_ratios=heights, squeeze=False
    )
    for (panel, rows), one in zip(panels, axes[:, 0], strict=True):
        panel(one, rows)
    figure.suptitle(title, fontsize=9)
    figures.save(figure, folder / "report.png", dpi=130)
    return "picture: report.png"


def _kernels(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw each kernel's fraction of the ceiling that bounds it."""
    rows = rows[::-1]
    fractions = [row["of_ceiling"][row["bound"]] for row in rows]
    names = [f"{row['name']} ({row['bound']})" for row in rows]
    axes.barh(names, fractions)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of the measured ceiling")
    axes.tick_params(axis="y", labelsize=7)


def _decode(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw milliseconds per token over the context."""
    from benchmarks.serving import report

    for name in dict.fromkeys((row["model"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["name"]) == name]
        mine.sort(key=lambda row: row["context"])
        axes.plot(
            [row["context"] for row in mine],
            [row["ms"]["median"] for row in mine],
            "o-" if name[1] == "duo" else "s--",
            label=" ".join(name),
        )
    report.token_axis(axes, [row["context"] for row in rows])
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
