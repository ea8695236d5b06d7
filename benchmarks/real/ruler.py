"""RULER's scores, from what lm-evaluation-harness writes for each length."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.real import tables


def scores(found: Mapping[str, Mapping[str, Any]], task: str) -> tables.Texts:
    """Return, by setting and length, a score for each question of a task with one answer.

    The harness gives their mean only: of questions that are right or wrong, that is all there is.
    """
    texts: tables.Texts = {}
    for entry in found.values():
        result = entry["result"]
        if task not in result["results"]:
            continue
        measured, questions = result["results"][task], result["n-samples"][task]["effective"]
        for name, value in measured.items():
            length, _, rest = name.partition(",")
            if length.isdecimal() and rest == "none" and isinstance(value, float) and value >= 0:
                right = round(value * questions)
                each = np.array([1.0] * right + [0.0] * (questions - right))
                texts.setdefault(entry["row"], {})[int(length)] = each
    return texts


def tasks(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of all tasks."""
    names = [name for entry in found.values() for name in entry["result"]["results"]]
    return list(dict.fromkeys(names))
