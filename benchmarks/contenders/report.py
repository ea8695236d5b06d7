"""Table and picture of benchmarks.real_speed."""

from typing import Any

from benchmarks.columns import Column
from benchmarks.serving.report import Report, Result
from duo_jax.reports import figures

_SPREAD = "{0[median]:,.0f} ({0[low]:,.0f} to {0[high]:,.0f})"
_PANELS = (("prefill", "tokens read per second"), ("decode", "tokens written per second"))


def _draw(report: Report, result: Result) -> Any:
    """Draw bars of both speeds and of memory; a row of panels per length."""
    rows = result["rows"]
    lengths = sorted({row[report.axis] for row in rows})
    figure, axes = figures.new_figure(
        13.0, 2.9 * len(lengths), nrows=len(lengths), ncols=3, squeeze=False
    )
    for panels, length in zip(axes, lengths, strict=True):
        mine = [row for row in rows if row[report.axis] == length][::-1]
        names = [row["name"] for row in mine]
        colours = ["C0" if row["name"].startswith(("full", "duo")) else "C7" for row in mine]
        for panel, (key, label) in zip(panels, _PANELS, strict=False):
            panel.barh(names, [row[key]["median"] for row in mine], color=colours)
            panel.set_xlabel(f"{label}, {length:,} tokens")
        panels[2].barh(names, [row["peak_bytes"] / 1e6 for row in mine], color=colours)
        panels[2].set_xlabel("peak memory, MB")
        for panel in panels[1:]:
            panel.set_yticklabels([])
    return figure


class _OfOneMachine(Report):
    """A report that says below its table what the machine copies, and every version."""

    def to_markdown(self, result: Result) -> str:
        versions = {name: x for of in result["versions"].values() for name, x in of.items()}
        words = [
            result["hardware"],
            f"copies {result['copy_bandwidth'] / 1e9:.1f} GB/s",
            f"load {result['load_before']} before",
            *(f"{name} {version}" for name, version in versions.items()),
        ]
        return f"{super().to_markdown(result)}\n\n{'; '.join(words)}."


REPORT = _OfOneMachine(
    title="A real model on a CPU",
    columns=(
        Column("tokens", "length", "{:,}"),
        Column("program", "name"),
        Column("weights", "weights"),
        Column("prefill tokens/s (quartiles)", "prefill", _SPREAD),
        Column("to full", "prefill_ratio", "{:.2f}"),
        Column("decode tokens/s (quartiles)", "decode", _SPREAD.replace(".0f", ".1f")),
        Column("to full", "decode_ratio", "{:.2f}"),
        Column("GB/s", "gb_per_second", "{:.1f}"),
        Column("peak MB", "peak_bytes", "{:,.0f}", 1e6),
        Column("with start", "start_peak_bytes", "{:,.0f}", 1e6),
        Column("same tokens", "same_tokens"),
    ),
    axis="length",
    axis_label="tokens of the prompt",
    draw=_draw,
)
