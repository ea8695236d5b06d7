"""The Mosaic kernels in the report: timed beside the Triton ones, and what "auto" makes of that."""

import pathlib
from typing import Any

from duo_jax.schema.json_reader import read_json
from kernels import dispatch
from kernels.all_cases import Cases, named, served_by_mosaic
from kernels.case import Case
from kernels.dispatch import Implementation
from kernels.errors import UnsupportedError
from kernels.gpu import Gpu

RESULT = pathlib.Path("benchmarks/results/gpu/kernels.json")
_MIN_SPEEDUP = 1.02  # less is the spread of two measurements


def unavailable(implementation: Implementation) -> str | None:
    """Return why no Mosaic kernel can run here; None if they can."""
    try:
        dispatch.check(implementation)
    except UnsupportedError as error:
        return str(error)
    return None


def served(cases: Cases) -> dict[str, Case]:
    """Return the cases, of ops, that have a Mosaic kernel, by "mosaic, op: name"."""
    return {
        f"mosaic, {name}": case for name, case in named(cases).items() if served_by_mosaic(case)
    }


def faster_ops(result: dict[str, Any] | None) -> set[str]:
    """Return the ops that "auto" may compute by Mosaic: faster than Triton in every timed case.

    Args:
      result: what the stage `kernels` wrote; None if there is no committed run.
    """
    if result is None or result["smoke"] or not Gpu(kind=result["hardware"], num_cores=1).is_hopper:
        return set()
    speedups: dict[str, list[float]] = {}
    for row in result["rows"]:
        if "speedup" in row.get("mosaic", {}):
            speedups.setdefault(row["op"], []).append(row["mosaic"]["speedup"])
    return {op for op, found in speedups.items() if min(found) >= _MIN_SPEEDUP}


def committed() -> dict[str, Any] | None:
    """Return the committed run's table of kernels; None if there is none."""
    return read_json(RESULT) if RESULT.exists() else None
