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

RESULTS = pathlib.Path("benchmarks/results/gpu")
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


def faster_ops(kernels: dict[str, Any] | None, checks: dict[str, Any] | None) -> set[str]:
    """Return the ops that "auto" may compute by Mosaic: right and faster than Triton in every case.

    An op of which a case failed, was wrong or was not reached is not among them.

    Args:
      kernels: what the stage `kernels` wrote; None if there is no committed run.
      checks: what the stage `checks` of the same run wrote.
    """
    if kernels is None or checks is None or kernels["smoke"]:
        return set()
    if not Gpu(kind=kernels["hardware"], num_cores=1).is_hopper:
        return set()
    speedups: dict[str, list[float]] = {}
    unknown = list(kernels["not_reached"])  # names of cases: "op: case"
    for row in kernels["rows"]:
        timed = row.get("mosaic", {})
        if "failed" in row or "failed" in timed:
            unknown.append(row["name"])
        elif "speedup" in timed:
            speedups.setdefault(row["op"], []).append(timed["speedup"])
    of_mosaic = "mosaic, "
    unchecked = [row["name"] for row in checks["rows"] if not row.get("passed")]
    unknown += [
        name.removeprefix(of_mosaic)
        for name in [*unchecked, *checks["not_reached"]]
        if name.startswith(of_mosaic)
    ]
    left_out = {name.partition(":")[0] for name in unknown}
    faster = {op for op, found in speedups.items() if min(found) >= _MIN_SPEEDUP}
    return faster - left_out


def committed(stage: str) -> dict[str, Any] | None:
    """Return what a stage of the committed run wrote; None if there is no such run."""
    path = RESULTS / f"{stage}.json"
    return read_json(path) if path.exists() else None
