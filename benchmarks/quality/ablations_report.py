"""Tables and picture of benchmarks.ablations."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from duo_jax.reports import figures, markdown

METHODS = {
    "optimise": "distillation on passkeys (the paper's)",
    "budget": "gates under a budget",
    "masks": "masks",
    "attribute": "attribution",
    "profile": "attention profile",
    "reconstruct": "reconstruction",
    "lm": "language-modelling loss",
    "random": "random",
}
WINDOWS = {"both": "sinks and recents", "sinks": "sinks only", "recents": "recents only"}


def to_markdown(result: dict[str, Any]) -> str:
    """Write the settings and one table for each panel."""
    settings, how = result["settings"], result["identification"]
    sparsities = settings["sparsities"]
    streaming = [f"{sparsity:.1%} streaming" for sparsity in sparsities]
    methods, windows, sizes = (result[name] for name in ("methods", "windows", "sizes"))
    lines = [
        f"# Ablations on {result['model']}",
        "",
        f"Exact retrieval of {result['passkeys']} passkeys in {settings['samples']} texts of "
        f"{result['length']} tokens ({result['haystack']}); full caches {result['full']:.1%}, all "
        f"heads streaming {result['all_streaming']:.1%}. Identified with sink {how['sink']}, "
        f"recent {how['recent']}, {how['num_steps']} steps, penalty {how['reg_weight']} "
        f"(language-modelling loss {settings['lm_reg_weight']}), masks "
        f"{settings['mask_steps']} steps, {how['profile_samples']} samples for the profile and for "
        "reconstruction. No number has a standard error over texts above "
        f"{result['largest_standard_error']:.1%}.",
        "",
        f"(a) How heads are chosen; mean and range of {_seeds(settings['seeds'])} (random: "
        f"{_seeds(settings['random_seeds'])}), counted from 0. Gates under a budget, masks and "
        "attribution are made for each sparsity.",
        "",
        markdown.table(
            ("heads by", *streaming),
            [
                (label, *(_spread(row["exact"]) for row in _rows(methods, method=method)))
                for method, label in METHODS.items()
            ],
        ),
        "",
        "(b) What streaming heads see, in the same number of slots; seed 0.",
        "",
        markdown.table(
            ("identified with", "deployed with", "sink", "recent", *streaming),
            [
                (
                    WINDOWS[identified],
                    WINDOWS[deployed],
                    str(rows[0]["sink"]),
                    str(rows[0]["recent"]),
                    *(f"{row['exact']:.1%}" for row in rows),
                )
                for identified, deployed in _window_pairs(windows)
                for rows in [_rows(windows, identified=identified, deployed=deployed)]
            ],
        ),
    ]
    for sparsity in settings["grid_sparsities"]:
        grid = _grid(sizes, settings, sparsity)
        lines += [
            "",
            f"(c) Deployed sizes, {sparsity:.1%} of the heads streaming; seed 0.",
            "",
            markdown.table(
                ("", *(f"recent {recent}" for recent in settings["recents"])),
                [
                    (f"sink {sink}", *(f"{value:.1%}" for value in values))
                    for sink, values in zip(settings["sinks"], grid, strict=True)
                ],
            ),
        ]
    lines += [
        "",
        f"{result['hardware']}, jax {result['jax']}, {how['dtype']}; "
        f"{result['run_minutes']} minutes. `{result['command']}`",
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draw (a) and (b) as curves over the sparsity, and below them (c) as heat maps."""
    settings, how = result["settings"], result["identification"]
    maps = settings["grid_sparsities"]
    figure = Figure(figsize=(11, 9.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    above, below = halves
    of_methods, of_windows = above.subplots(1, 2, sharey=True)
    _draw_methods(of_methods, result)
    _draw_windows(of_windows, result)
    for panel in (of_methods, of_windows):
        panel.axhline(100 * result["full"], color="black", linewidth=0.8, label="full caches")
        panel.axhline(
            100 * result["all_streaming"], color="black", linewidth=0.8, linestyle=":",
            label="all heads streaming",
        )  # fmt: skip
        ticks = [100 * sparsity for sparsity in settings["sparsities"]]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlabel("streaming heads (% of all KV heads)")
        panel.set_ylim(-3, 103)
        panel.grid(alpha=0.3)
        # Below the axes: the curves may be anywhere.
        panel.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    of_methods.set_ylabel("exact passkey retrieval (%)")

    panels = below.subplots(1, len(maps), squeeze=False)[0]
    for panel, sparsity in zip(panels, maps, strict=True):
        image = _draw_grid(panel, _grid(result["sizes"], settings, sparsity), settings)
        panel.set_title(f"(c) deployed sizes, {100 * sparsity:g}% streaming", fontsize=10)
    below.colorbar(image, ax=list(panels), label="exact passkey retrieval (%)")
    data = how["data"]
    figure.suptitle(
        f"Ablations on {result['model']} ({result['layers']} layers x {result['kv_heads']} KV "
        f"heads, {how['dtype']}): {result['passkeys']} passkeys of {data['passkey_words']} words "
        f"in {settings['samples']} texts of {result['length']} tokens\nidentified with sink "
        f"{how['sink']}, recent {how['recent']}, {how['num_steps']} steps; {result['hardware']}, "
        f"jax {result['jax']}",
        fontsize=10,
    )
    figures.save(figure, path, dpi=150)


def _draw_methods(panel: Any, result: dict[str, Any]) -> None:
    for name, label in METHODS.items():
        rows = _rows(result["methods"], method=name)
        exact = [100 * np.array(row["exact"]) for row in rows]
        mean = [values.mean() for values in exact]
        low, high = [values.min() for values in exact], [values.max() for values in exact]
        x = [100 * row["sparsity"] for row in rows]
        (line,) = panel.plot(x, mean, "o-", label=f"{label} ({_seeds(len(exact[0]))})")
        panel.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set_title("(a) how heads are chosen: mean and range of seeds", fontsize=10)


def _draw_windows(panel: Any, result: dict[str, Any]) -> None:
    colours = dict(zip(WINDOWS, ("C0", "C1", "C2"), strict=True))
    for identified, deployed in _window_pairs(result["windows"]):
        rows = _rows(result["windows"], identified=identified, deployed=deployed)
        only_deployed = identified != deployed
        label = f"{WINDOWS[deployed]} ({rows[0]['sink']} + {rows[0]['recent']})"
        if only_deployed:
            label += ", deployed only"
        panel.plot(
            [100 * row["sparsity"] for row in rows],
            [100 * row["exact"] for row in rows],
            "s--" if only_deployed else "o-",
            markersize=9 if only_deployed else 6,  # around a curve that it may coincide with
            markerfacecolor="none" if only_deployed else None,
            color=colours[deployed],
            label=label,
        )
    panel.set_title("(b) what streaming heads see (sink + recent slots), seed 0", fontsize=10)


def _draw_grid(panel: Any, grid: np.ndarray, settings: dict[str, Any]) -> Any:
    image = panel.imshow(100 * grid, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    panel.set_xticks(range(len(settings["recents"])), settings["recents"])
    panel.set_yticks(range(len(settings["sinks"])), settings["sinks"])
    panel.set_xlabel("recent tokens")
    panel.set_ylabel("sinks (tokens)")
    for (row, column), value in np.ndenumerate(100 * grid):
        colour = "white" if value > 60 else "black"
        panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    return image


def _grid(sizes: Sequence[dict[str, Any]], settings: dict[str, Any], sparsity: float) -> np.ndarray:
    """Return exact retrieval [sinks, recents] at one sparsity."""
    return np.array(
        [
            [
                _rows(sizes, sparsity=sparsity, sink=sink, recent=recent)[0]["exact"]
                for recent in settings["recents"]
            ]
            for sink in settings["sinks"]
        ]
    )


def _window_pairs(windows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["identified"], row["deployed"]) for row in windows))


def _rows(rows: Sequence[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"
