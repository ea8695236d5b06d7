"""Tables and pictures of the serving benchmarks, from their result files."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import columns
from benchmarks.columns import Column
from duo_jax.reports import figures

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Table and picture of one benchmark."""

    title: str
    columns: Sequence[Column]
    axis: str  # key of the number of tokens
    axis_label: str
    draw: Callable[["Report", Result], Any]
    # The upper and the lower panels of `_draw_splits`.
    time: str = ""
    time_label: str = ""
    ratios: tuple[tuple[str, str, str], ...] = ()  # key, style, what it is a ratio of
    ratio_label: str = ""

    def to_markdown(self, result: Result) -> str:
        """Write the rows as a table, and below it what was skipped."""
        table = columns.table(self.columns, result["rows"])
        return "\n".join([table, *("\n" + line for line in result["skipped"])])

    def plot(self, result: Result, path: pathlib.Path) -> None:
        """Draw the rows over the number of tokens."""
        figure = self.draw(self, result)
        figure.suptitle(title(result, self.title), fontsize=10)
        figures.save(figure, path, dpi=150)

    def longest(self, result: Result) -> Result:
        """Return a result with the rows of its largest number of tokens only."""
        most = max(row[self.axis] for row in result["rows"])
        return result | {"rows": [row for row in result["rows"] if row[self.axis] == most]}


def _draw_splits(report: Report, result: Result) -> Any:
    """Draw times, and below them speed-ups and their floors; a column of panels per geometry."""
    settings, rows = result["settings"], result["rows"]
    geometries = list(dict.fromkeys(row["geometry"] for row in rows))
    figure, axes = figures.new_figure(
        5.6 * len(geometries), 7.6, nrows=2, ncols=len(geometries), squeeze=False, sharex=True
    )
    for (upper, lower), geometry in zip(axes.T, geometries, strict=True):
        of_geometry = [row for row in rows if row["geometry"] == geometry]
        for i, name in enumerate(dict.fromkeys(row["name"] for row in of_geometry)):
            mine = [row for row in of_geometry if row["name"] == name]
            tokens, times = [row[report.axis] for row in mine], [row[report.time] for row in mine]
            ours = report.ratios[0][0] in mine[0]
            upper.errorbar(
                tokens, [time["median"] for time in times],
                [[time["median"] - time["low"] for time in times],
                 [time["high"] - time["median"] for time in times]],
                fmt="o-" if ours else "s:", capsize=3, color=f"C{i}", label=name,
            )  # fmt: skip
            if ours and name != "full":
                for key, style, what in report.ratios:
                    values = [row[key] for row in mine]
                    lower.plot(tokens, values, style, color=f"C{i}", label=f"{name}, {what}")
        upper.set_title(
            f"{geometry} (layers: {settings['layers']}, width: {settings['embed']:,})", fontsize=10
        )
        log_axis(upper, f"{report.time_label} (median, quartiles)")
        lower.set_ylabel(report.ratio_label)
        lower.set_xlabel(report.axis_label)
        lower.set_ylim(bottom=0)
        for panel in (upper, lower):
            token_axis(panel, [row[report.axis] for row in of_geometry])
    return figure


def _draw_formats(report: Report, result: Result) -> Any:
    """Draw the time of the attention part, and beside it the bytes of the cache."""
    rows = result["rows"]
    figure, (times, sizes) = figures.new_figure(11.0, 4.5, ncols=2)
    for name, kv in dict.fromkeys((row["name"], row["kv"]) for row in rows):
        mine = [row for row in rows if (row["name"], row["kv"]) == (name, kv)]
        tokens, label = [row[report.axis] for row in mine], f"{name}, {kv}"
        times.plot(tokens, [row["attention_ms"]["median"] for row in mine], "o-", label=label)
        sizes.plot(tokens, [row["cache_bytes"] / 1e6 for row in mine], "o-", label=label)
    log_axis(times, "attention part, ms per token (median)")
    log_axis(sizes, "cache, MB")
    for panel in (times, sizes):
        token_axis(panel, [row[report.axis] for row in rows])
        panel.set_xlabel(report.axis_label)
    return figure


def title(result: Result, what: str) -> str:
    """Say what was measured, on what."""
    return f"{what}\n{result['hardware']}, jax {result['jax']}, {result['settings']['dtype']}"


def token_axis(axes: Any, tokens: Sequence[int]) -> None:
    """Mark numbers of tokens on a logarithmic x axis."""
    ticks = sorted(set(tokens))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def log_axis(axes: Any, label: str) -> None:
    """Make the y axis logarithmic, with 1, 2, 5, 10, ... written out."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(label)


_SPREAD = "{0[median]:.1f} ({0[low]:.1f} to {0[high]:.1f})"
_GEOMETRY, _NAME = Column("attention", "geometry"), Column("caches", "name")
_CONTEXT = Column("context", "context", "{:,}")
_MS, _ATTENTION_MS = (
    Column("ms/token (quartiles)", "ms", _SPREAD),
    Column("attention ms", "attention_ms", "{0[median]:.1f}"),
)
_SPEEDUP, _ATTENTION_SPEEDUP = (
    Column("speed-up", "speedup", "{:.2f}"),
    Column("speed-up", "attention_speedup", "{:.2f}"),
)
_CACHE = Column("cache MB", "cache_bytes", "{:,.0f}", 1e6)

DECODE = Report(
    title="Decoding one token",
    columns=(
        _GEOMETRY, _CONTEXT, _NAME, _MS, _SPEEDUP,
        Column("floor", "floor_step_speedup", "{:.2f}"),
        _ATTENTION_MS, _ATTENTION_SPEEDUP,
        Column("floor", "floor_attention_speedup", "{:.2f}"),
        _CACHE,
    ),
    axis="context",
    axis_label="tokens in the cache",
    draw=_draw_splits,
    time="ms",
    time_label="ms per token",
    ratios=(("attention_speedup", "o-", "time"), ("floor_attention_speedup", "--", "bytes")),
    ratio_label="attention part, full / duo",
)  # fmt: skip
DECODE_KV = Report(
    title="Decoding one token, by format of the cache",
    columns=(
        _GEOMETRY, _CONTEXT, _NAME, Column("KV", "kv"),
        Column("cache MB", "cache_bytes", "{:,.1f}", 1e6),
        _MS, _SPEEDUP, Column("floor", "floor", "{:.2f}"),
        _ATTENTION_MS, _ATTENTION_SPEEDUP, Column("floor", "attention_floor", "{:.2f}"),
    ),
    axis="context",
    axis_label="tokens in the cache",
    draw=_draw_formats,
)  # fmt: skip
PREFILL = Report(
    title="Reading a prompt",
    columns=(
        _GEOMETRY, Column("tokens", "length", "{:,}"), _NAME,
        Column("seconds (quartiles)", "seconds", _SPREAD.replace(".1f", ".2f")),
        _SPEEDUP, Column("floor (FLOPs)", "floor_speedup", "{:.2f}"),
        _CACHE, Column("temporary MB", "temp_bytes", "{:,.0f}", 1e6),
    ),
    axis="length",
    axis_label="tokens of the prompt",
    draw=_draw_splits,
    time="seconds",
    time_label="seconds",
    ratios=(("floor_speedup", "--", "FLOPs"), ("speedup", "o-", "time")),
    ratio_label="full / duo",
)  # fmt: skip
REPORTS = {"decode": DECODE, "decode_kv": DECODE_KV, "prefill": PREFILL}
