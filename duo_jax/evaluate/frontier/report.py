"""The report of the frontier: JSON, tables and a picture."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from duo_jax import files
from duo_jax.evaluate.frontier import search
from duo_jax.evaluate.frontier.search import Point, Skipped
from duo_jax.evaluate.results import describe
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.reports import figures, markdown, statistics

# By the axes on which a setting saves bytes. The palette is colour-blind safe.
_STYLES = {
    (): ("full caches", "#000000", "*"),
    ("split",): ("head split alone", "#0072B2", "o"),
    ("format",): ("format alone", "#E69F00", "s"),
    ("eviction",): ("eviction alone", "#D55E00", "^"),
    ("split", "format"): ("split and format", "#56B4E9", "D"),
    ("split", "eviction"): ("split and eviction", "#CC79A7", "v"),
    ("format", "eviction"): ("format and eviction", "#8B5A2B", "P"),
    ("split", "format", "eviction"): ("all three", "#009E73", "X"),
}


def write(
    folder: pathlib.Path,
    name: str,
    result: dict[str, Any],
    points: Sequence[Point],
    skipped: Sequence[Skipped],
) -> None:
    """Write NAME.json, NAME.md and NAME.png into a folder, and print the tables."""
    text = to_markdown(result, points, skipped)
    files.write_text(folder / f"{name}.json", to_json(result))
    files.write_text(folder / f"{name}.md", text + "\n")
    files.write_bytes(folder / f"{name}.png", png(result, points))
    print(text)
    print(f"written: {folder / name}.json, .md, .png")


def to_markdown(result: dict[str, Any], points: Sequence[Point], skipped: Sequence[Skipped]) -> str:
    """Write a table of all settings, and the best one for each budget.

    Behind ± stand two standard errors over texts.
    """
    on_frontier = search.frontier(points)
    lines = [
        (
            point.setting.name,
            f"{point.share:.1%}",
            statistics.percent(point.exact),
            statistics.nats(point.nll),
            "yes" if point in on_frontier else "",
        )
        for point in sorted(points, key=lambda point: -point.share)
    ]
    heading = ("setting", "bytes, measured", "exact retrieval", "answer NLL (nats)", "frontier")
    parts = [markdown.table(heading, lines)]
    if skipped:
        number = f"{len(skipped)} settings were not measured" if len(skipped) > 1 else "1 was not"
        reasons = (f"- {why.setting.name}: {why.reason}" for why in skipped)
        parts.append("\n".join([f"{number}, as they can only be worse:", "", *reasons]))
    parts += ["\n".join(_of_budget(result, points, budget)) for budget in result["budgets"]]
    return "\n\n".join(parts)


def _of_budget(result: dict[str, Any], points: Sequence[Point], budget: float) -> Iterator[str]:
    """Yield the lines about a budget."""
    best = search.best(points, budget)
    if best is None:
        smallest = min(points, key=lambda point: point.share)
        yield (
            f"**{budget:.1%} of the bytes**: nothing fits; the smallest setting that was measured "
            f"is {smallest.setting.name}, {smallest.share:.1%}."
        )
        return
    yield (
        f"**{budget:.1%} of the bytes**: {best.setting.name}, with {best.share:.1%}, "
        f"{statistics.percent(best.exact)} exact, NLL {statistics.nats(best.nll)}:"
    )
    yield from ("", f"    {_load(result, best)}", "")
    singles = list(search.singles(points, budget))
    if not singles:
        yield "No axis alone was measured with so few bytes."
    for single in singles:
        if single is best:
            yield "No other axis, and no combination, does better within these bytes."
            continue
        change = best.nll - single.nll
        yield (
            f"- minus {single.setting.name} ({single.share:.1%}): NLL {statistics.change(change)}, "
            f"exact {100 * (best.exact - single.exact).mean():+.1f} points"
        )


def _load(result: dict[str, Any], point: Point) -> str:
    """Return the line of Python that loads the model in a setting."""
    arguments: dict[str, object] = {}
    if point.setting.sparsity == 0:
        arguments["pattern"] = "none"
    else:
        if result["pattern"] != "the model's own":
            arguments["pattern"] = result["pattern"]
        arguments["sparsity"] = point.setting.sparsity
    arguments |= point.setting.formats()
    if point.setting.keep < 1:
        arguments["keep_by"] = result["keep_by"]
    sizes = () if point.setting.sparsity else ("sink_size", "recent_size")
    arguments |= {name: value for name, value in result["load"].items() if name not in sizes}
    words = [f"{result['model']!r}", *(f"{name}={value!r}" for name, value in arguments.items())]
    return f"duo_jax.load({', '.join(words)})".replace("'", '"')


def png(result: dict[str, Any], points: Sequence[Point]) -> bytes:
    """Draw likelihood and exact retrieval against bytes, and the frontier; return a PNG."""
    figure, panels = figures.new_figure(12.6, 4.8, ncols=2)
    on_frontier = search.frontier(points)
    for axes, score in zip(panels, ("nll", "exact"), strict=True):
        for kind, (label, colour, marker) in _STYLES.items():
            some = [point for point in points if point.setting.axes == kind]
            if not some:
                continue
            axes.errorbar(
                [point.share for point in some],
                [getattr(point, score).mean() for point in some],
                yerr=[2 * statistics.standard_error(getattr(point, score)) for point in some],
                label=label,
                color=colour,
                marker=marker,
                linestyle="",
                markersize=10 if not kind else 6,
                capsize=2,
                elinewidth=0.8,
            )
        axes.step(
            [point.share for point in on_frontier],
            [getattr(point, score).mean() for point in on_frontier],
            where="post",
            color="#666666",
            linewidth=1,
            zorder=1,
            label="frontier (by NLL)",
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.set_xlabel("KV bytes, measured, of full caches")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("answer NLL, nats per token (± 2 standard errors)")
    if min(point.nll.mean() for point in points) > 0:
        panels[0].set_yscale("log")
    panels[1].set_ylabel("exact retrieval (± 2 standard errors)")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
    tasks = "; ".join(about["in_words"] for about in result["tasks"].values())
    figure.suptitle(
        f"{result['model']}: {result['samples']} texts of {result['length']:,} tokens, {tasks}\n"
        f"{describe.in_words(result)}",
        fontsize=10,
    )
    return figures.png(figure, dpi=130)
