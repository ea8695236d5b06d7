"""Pictures of a run; none where matplotlib is not installed."""

import importlib.util
import pathlib
from typing import Any

from benchmarks import charts
from benchmarks.gpu.tables import Table


def draw(tables: dict[str, Table], folder: pathlib.Path, *, title: str) -> str:
    """Write kernels.png and decode.png where there is something to show; say what was done."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no pictures: matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, panel in (("kernels", _kernels), ("decode", _decode)):
        rows = [row for row in tables[name].rows if "failed" not in row] if name in tables else []
        if not rows:
            continue
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        panel(axes, rows)
        figure.suptitle(title, fontsize=9)
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
        written.append(f"{name}.png")
    return f"pictures: {', '.join(written) or 'none, nothing was measured'}"


def _kernels(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw each kernel's fraction of the ceiling that bounds it."""
    rows = [row for row in rows if "of_ceiling" in row][::-1]
    fractions = [row["of_ceiling"][row["bound"]] for row in rows]
    names = [f"{row['name']} ({row['bound']})" for row in rows]
    axes.barh(names, fractions)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of the measured ceiling")
    axes.tick_params(axis="y", labelsize=7)


def _decode(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw milliseconds per token over the context."""
    for name in dict.fromkeys((row["model"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["name"]) == name]
        mine.sort(key=lambda row: row["context"])
        axes.plot(
            [row["context"] for row in mine],
            [row["ms"]["median"] for row in mine],
            "o-" if name[1] == "duo" else "s--",
            label=" ".join(name),
        )
    charts.token_axis(axes, [row["context"] for row in rows])
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
