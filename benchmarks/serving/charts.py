"""How the pictures of the serving benchmarks look."""

from collections.abc import Sequence
from typing import Any


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


def title(result: dict[str, Any], what: str) -> str:
    """Say what was measured, on what."""
    return f"{what}\n{result['hardware']}, jax {result['jax']}, {result['settings']['dtype']}"
