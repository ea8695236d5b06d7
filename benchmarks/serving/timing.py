"""Times that can be compared on a machine that others use too."""

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Time calls in turn, so that a slow minute of the machine meets all of them.

    Each must have finished its work when it returns.

    Returns:
      Seconds of every call, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: list[float], *, scale: float = 1.0) -> dict[str, float]:
    """Return the median and the quartiles, times `scale`."""
    low, high = (float(q) for q in np.quantile(seconds, (0.25, 0.75)))
    return {
        "median": statistics.median(seconds) * scale,
        "low": low * scale,
        "high": high * scale,
        "samples": len(seconds),
    }
