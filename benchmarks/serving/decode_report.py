"""Table and picture of benchmarks.decode."""

import pathlib
from typing import Any

from benchmarks.serving import charts

Row = dict[str, Any]


def to_markdown(result: dict[str, Any]) -> str:
    """Write the rows as a table; attention and floors exist for duo_jax only."""
    lines = [
        "| attention | context | caches | ms/token (quartiles) | speed-up | floor "
        "| attention ms | speed-up | floor | cache MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    return "\n".join([*lines, *("\n" + line for line in result["skipped"])])


def _cells(row: Row) -> list[str]:
    ms = row["ms"]
    ours = "attention_ms" in row
    return [
        row["geometry"],
        f"{row['context']:,}",
        row["name"],
        f"{ms['median']:.1f} ({ms['low']:.1f} to {ms['high']:.1f})",
        f"{row['speedup']:.2f}",
        f"{row['floor_step_speedup']:.2f}" if ours else "",
        f"{row['attention_ms']['median']:.1f}" if ours else "",
        f"{row['attention_speedup']:.2f}" if ours else "",
        f"{row['floor_attention_speedup']:.2f}" if ours else "",
        f"{row['cache_bytes'] / 1e6:,.0f}",
    ]


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw time per token over the context, and below the speed-up of attention and its floor."""
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
        colours = {name: f"C{i}" for i, name in enumerate(names)}
        for name in names:
            of_name = [row for row in rows if row["name"] == name]
            contexts = [row["context"] for row in of_name]
            ours = "attention_ms" in of_name[0]
            medians = [row["ms"]["median"] for row in of_name]
            errors = [
                [row["ms"]["median"] - row["ms"]["low"] for row in of_name],
                [row["ms"]["high"] - row["ms"]["median"] for row in of_name],
            ]
            axes[0, column].errorbar(
                contexts, medians, errors, fmt="o-" if ours else "s:", capsize=3,
                color=colours[name], label=name,
            )  # fmt: skip
            if ours and name != "full":
                for key, style, what in (
                    ("attention_speedup", "o-", "time"),
                    ("floor_attention_speedup", "--", "bytes"),
                ):
                    values = [row[key] for row in of_name]
                    label = f"{name}, {what}"
                    axes[1, column].plot(contexts, values, style, color=colours[name], label=label)
        axes[0, column].set_title(
            f"{geometry} (layers: {settings['layers']}, width: {settings['embed']:,})", fontsize=10
        )
        charts.log_axis(axes[0, column], "ms per token (median, quartiles)")
        axes[1, column].set_ylabel("attention part, full / duo")
        axes[1, column].set_xlabel("tokens in the cache")
        axes[1, column].set_ylim(bottom=0)
        for panel in axes[:, column]:
            charts.token_axis(panel, [row["context"] for row in rows])
    figure.suptitle(charts.title(result, "Decoding one token"), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
