"""The Mosaic kernels in the report: timed beside the Triton ones, and what "auto" makes of that."""

import pathlib
from typing import Any

from benchmarks.gpu.tables import incomplete_ops, op_of
from duo_jax.schema.json_reader import read_json
from kernels import dispatch
from kernels.all_cases import Cases, named, served_by_mosaic
from kernels.case import Case
from kernels.dispatch import Implementation
from kernels.errors import UnsupportedError
from kernels.gpu import Gpu

RESULTS = pathlib.Path("benchmarks/results/gpu")
_ENDED = {"complete", "out of time"}
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
      checks: what the stage `mosaic_checks` wrote, on the same hardware.
    """
    if kernels is None or checks is None or kernels["smoke"]:
        return set()
    if not {kernels["status"], checks["status"]} <= _ENDED:  # stopped: what was left is not known
        return set()
    if not Gpu(kind=kernels["hardware"], num_cores=1).is_hopper:
        return set()
    speedups: dict[str, list[float]] = {}
    incomplete = incomplete_ops(kernels["rows"], kernels["not_reached"])
    for row in kernels["rows"]:
        timed = row.get("mosaic", {})
        if "failed" in timed:
            incomplete.add(row["op"])
        elif "speedup" in timed:
            speedups.setdefault(row["op"], []).append(timed["speedup"])
    unchecked = incomplete_ops(checks["rows"], checks["not_reached"])
    unchecked |= {op_of(row["name"]) for row in checks["rows"] if not row.get("passed")}
    return {
        op
        for op, found in speedups.items()
        if min(found) >= _MIN_SPEEDUP and op not in incomplete and f"mosaic, {op}" not in unchecked
    }


def committed(stage: str) -> dict[str, Any] | None:
    """Return what a stage of the committed run wrote; None if there is no such run."""
    path = RESULTS / f"{stage}.json"
    if path.exists():
        return read_json(path)
    parts = [read_json(path) for path in sorted(RESULTS.glob(f"{stage}-*-of-*.json"))]
    if not parts or len(parts) != parts[0]["parts"]:
        return None
    joined = {key: [x for part in parts for x in part[key]] for key in ("rows", "not_reached")}
    stopped = [part["status"] for part in parts if part["status"] not in _ENDED]
    return parts[0] | joined | {"status": (stopped or ["complete"])[0]}
