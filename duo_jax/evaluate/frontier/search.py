"""Which settings are measured, which are dominated, and which is the best for a budget.

Fewer bytes on one axis never help: a setting that saves at least as much on every axis as one that
was measured is taken to answer no better. So it need not be measured where another one, of no more
bytes, answers better than that. Answers are compared text by text, by their likelihood; better
means by more than two standard errors, and 0.01 nats per token.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.evaluate.frontier.settings import Setting
from duo_jax.reports.statistics import standard_error

FULL = Setting()
_LEAST = 0.01  # nats per token; smaller differences are none, however sure
_FORMATS = ("model", "bf16", "int8", "int4", "int2")  # from the most bits to the fewest


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """What was measured of a setting."""

    setting: Setting
    share: float  # bytes, of those of full caches
    nll: Float[np.ndarray, " texts"]  # of answers, nats per token
    exact: Float[np.ndarray, " texts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """Why a setting need not be measured."""

    setting: Setting
    reason: str


def joined(
    setting: Setting, rows: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]
) -> Point:
    """Join a setting's texts of all tasks; `full` has the rows of full caches, task by task.

    The share is the largest of any task.
    """
    both = zip(rows, full, strict=True)
    return Point(
        setting=setting,
        share=max(row["cache_bytes"] / whole["cache_bytes"] for row, whole in both),
        nll=np.concatenate([row["nll"] for row in rows]),
        exact=np.concatenate([row["exact"] for row in rows]),
    )


def stored(result: dict[str, Any]) -> tuple[list[Point], list[Skipped]]:
    """Return what a result file holds: points, and settings that were not measured."""
    tasks: dict[Setting, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        tasks.setdefault(_setting(row), []).append(row)
    points = [joined(setting, rows, tasks[FULL]) for setting, rows in tasks.items()]
    skipped = [Skipped(setting=_setting(row), reason=row["reason"]) for row in result["skipped"]]
    return points, skipped


def _setting(row: Mapping[str, Any]) -> Setting:
    return Setting(**{field.name: row[field.name] for field in dataclasses.fields(Setting)})


def in_order(settings: Sequence[Setting], shares: Mapping[Setting, float]) -> list[Setting]:
    """Return settings in the order in which they are measured.

    Those that save on one axis come first, as most others can only be worse than one of them; then
    the smallest, as what they reach need not be tried with more bytes.
    """
    return sorted(settings, key=lambda s: (min(len(s.axes), 2), shares[s]))


def why_skip(setting: Setting, share: float, points: Sequence[Point]) -> Skipped | None:
    """Return why a setting need not be measured; None: it must be."""
    coarser = [point for point in points if _saves_no_more(point.setting, setting)]
    small = [point for point in points if point.share <= share]
    for than in coarser:
        for better in small:
            if _better(better, than):
                reason = f"{better.setting.name} is better than {than.setting.name}"
                return Skipped(setting=setting, reason=reason)
    return None


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other has both fewer bytes and better answers than, by means."""
    found, best = [], np.inf
    for point in sorted(points, key=lambda p: (p.share, p.nll.mean())):
        if point.nll.mean() < best:
            found.append(point)
            best = point.nll.mean()
    return found


def best(points: Sequence[Point], budget: float) -> Point | None:
    """Return the point with the best answers within a budget; None: nothing fits."""
    fitting = [point for point in frontier(points) if point.share <= budget]
    return fitting[-1] if fitting else None


def singles(points: Sequence[Point], budget: float) -> Iterator[Point]:
    """Yield the best of each axis alone within a budget, where there is one."""
    for axis in ("split", "format", "eviction"):
        alone = [point for point in points if point.setting.axes in ((), (axis,))]
        found = best(alone, budget)
        if found is not None:
            yield found


def _saves_no_more(one: Setting, other: Setting) -> bool:
    return (
        one.sparsity <= other.sparsity
        and one.keep >= other.keep
        and _FORMATS.index(one.kv) <= _FORMATS.index(other.kv)
    )


def _better(one: Point, other: Point) -> bool:
    change = other.nll - one.nll
    # Of one text the error is not known, and nothing is more than nan.
    return bool(change.mean() > np.maximum(_LEAST, 2 * standard_error(change)))
