"""Table and picture of the formats of the cache in benchmarks.decode."""

import pathlib
from typing import Any

from benchmarks.serving import charts

Row = dict[str, Any]


def to_markdown(result: dict[str, Any]) -> str:
    """Write the rows as a table."""
    lines = [
        "| attention | context | caches | KV | cache MB | ms/token (quartiles) | speed-up | floor "
        "| attention ms | speed-up | floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw milliseconds of the attention part and bytes over the context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, kv in dict.fromkeys((row["name"], row["kv"]) for row in rows):
        mine = [row for row in rows if (row["name"], row["kv"]) == (name, kv)]
        contexts = [row["context"] for row in mine]
        for panel, values in (
            (axes[0], [row["attention_ms"]["median"] for row in mine]),
            (axes[1], [row["cache_bytes"] / 1e6 for row in mine]),
        ):
            panel.plot(contexts, values, "o-", label=f"{name}, {kv}")
    charts.log_axis(axes[0], "attention part, ms per token (median)")
    charts.log_axis(axes[1], "cache, MB")
    for panel in axes:
        charts.token_axis(panel, [row["context"] for row in rows])
        panel.set_xlabel("tokens in the cache")
    figure.suptitle(charts.title(result, "Decoding one token, by format of the cache"), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cells(row: Row) -> list[str]:
    ms = row["ms"]
    return [
        row["geometry"],
        f"{row['context']:,}",
        row["name"],
        row["kv"],
        f"{row['cache_bytes'] / 1e6:,.1f}",
        f"{ms['median']:.1f} ({ms['low']:.1f} to {ms['high']:.1f})",
        f"{row['speedup']:.2f}",
        f"{row['floor']:.2f}",
        f"{row['attention_ms']['median']:.1f}",
        f"{row['attention_speedup']:.2f}",
        f"{row['attention_floor']:.2f}",
    ]
