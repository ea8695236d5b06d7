"""Points of a comparison: a method at a budget, with all random draws together."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float

from duo_jax.reports.statistics import standard_error
from duo_jax.schema.kinds import Fraction, Nats, Size


class StoredRow(TypedDict, total=False):
    """What a row may hold: the attention profile's scores, or a cell and what was measured."""

    scores: list[list[float]]
    task: str
    method: str
    budget: Fraction
    draw: Size
    reason: str  # why nothing fits, in place of what follows
    exact: list[Fraction]  # an item per text, as the next
    tokens: list[Fraction]
    nll: list[Nats]  # rows of earlier versions lack this and the next
    kl: list[Nats] | None  # None: of full caches, the reference
    cache_bytes: int
    text_bytes: float | None
    full_bytes: int
    host_bytes: int  # of methods that keep something in the memory of the host
    setting: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A score of a method at a budget; `mean` is None where nothing fits or it was not measured."""

    method: str
    budget: float
    fits: bool = True
    share: float | None = None  # of the bytes of full caches, measured
    mean: float | None = None
    error: float = 0.0  # standard error over texts
    spread: tuple[float, float] | None = None  # lowest and highest mean of several draws
    texts: Float[np.ndarray, " texts"] | None = None  # mean over draws


def measured(result: dict[str, Any], score: str) -> bool:
    """Return whether any row holds a score: those of earlier versions lack some."""
    return any(row.get(score) is not None for row in result["rows"])


def points(result: dict[str, Any], task: str, score: str = "exact") -> list[Point]:
    """Return the points of a task, in the order in which they were measured."""
    by_place: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["task"] == task:
            by_place.setdefault((row["method"], row["budget"]), []).append(row)
    return [_point(*place, rows, score) for place, rows in by_place.items()]


def differences(
    found: Sequence[Point], method: str, other: str
) -> Iterator[tuple[float, float, float]]:
    """Yield budget, mean difference over texts, and its standard error, for budgets that both have.

    Full caches count at every budget.
    """
    by_place = {(point.method, point.budget): point for point in found}
    for (name, budget), point in by_place.items():
        rival = by_place.get((other, 1.0 if other == "full" else budget))
        if name != method or name == other or rival is None:
            continue
        if point.texts is None or rival.texts is None:
            continue
        change = point.texts - rival.texts
        yield budget, float(change.mean()), standard_error(change)


def _point(method: str, budget: float, rows: Sequence[dict[str, Any]], score: str) -> Point:
    if "reason" in rows[0]:
        return Point(method=method, budget=budget, fits=False)
    if any(row.get(score) is None for row in rows):
        return Point(method=method, budget=budget)
    draws = np.array([row[score] for row in rows])  # [draws, texts]
    means, texts = draws.mean(axis=1), draws.mean(axis=0)
    return Point(
        method=method,
        budget=budget,
        share=max(row["cache_bytes"] / row["full_bytes"] for row in rows),
        mean=float(means.mean()),
        error=standard_error(texts),
        spread=(float(means.min()), float(means.max())) if len(rows) > 1 else None,
        texts=texts,
    )
