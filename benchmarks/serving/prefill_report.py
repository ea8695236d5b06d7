"""Table and picture of benchmarks.prefill."""

import pathlib
from typing import Any

from benchmarks.serving import charts


def to_markdown(result: dict[str, Any]) -> str:
    """Write the rows as a table; floors and temporary memory are known of duo_jax only."""
    lines = [
        "| attention | tokens | caches | seconds (quartiles) | speed-up | floor (FLOPs) "
        "| cache MB | temporary MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        ours = "floor_speedup" in row
        cells = [
            row["geometry"],
            f"{row['length']:,}",
            row["name"],
            f"{seconds['median']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})",
            f"{row['speedup']:.2f}",
            f"{row['floor_speedup']:.2f}" if ours else "",
            f"{row['cache_bytes'] / 1e6:,.0f}",
            f"{row['temp_bytes'] / 1e6:,.0f}" if ours else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *("\n" + line for line in result["skipped"])])


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw seconds over the length, and below the speed-up and its floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = result["settings"]
    geometries = list(dict.fromkeys(row["geometry"] for row in result["rows"]))
    figure, axes = plt.subplots(
        2, len(geometries), figsize=(5.6 * len(geometries), 7.6), layout="constrained",
        squeeze=False, sharex=True,
    )  # fmt: skip
    for column, geometry in enumerate(geometries):
        rows = [row for row in result["rows"] if row["geometry"] == geometry]
        names = list(dict.fromkeys(row["name"] for row in rows))
        for i, name in enumerate(names):
            of_name = [row for row in rows if row["name"] == name]
            lengths = [row["length"] for row in of_name]
            ours = "floor_speedup" in of_name[0]
            seconds = [row["seconds"]["median"] for row in of_name]
            axes[0, column].plot(
                lengths, seconds, "o-" if ours else "s:", color=f"C{i}", label=name
            )
            if ours and name != "full":
                for key, style, what in (
                    ("speedup", "o-", "time"),
                    ("floor_speedup", "--", "FLOPs"),
                ):
                    values = [row[key] for row in of_name]
                    label = f"{name}, {what}"
                    axes[1, column].plot(lengths, values, style, color=f"C{i}", label=label)
        axes[0, column].set_title(
            f"{geometry} (layers: {settings['layers']}, width: {settings['embed']:,})", fontsize=10
        )
        charts.log_axis(axes[0, column], "seconds (median)")
        axes[1, column].set_ylabel("full / duo")
        axes[1, column].set_xlabel("tokens of the prompt")
        axes[1, column].set_ylim(bottom=0)
        for panel in axes[:, column]:
            charts.token_axis(panel, [row["length"] for row in rows])
    figure.suptitle(charts.title(result, "Reading a prompt"), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
