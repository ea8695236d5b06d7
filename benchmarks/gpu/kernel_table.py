"""The stage that times each kernel at its real sizes.

Beside it the Mosaic kernel, where it can run, and other libraries' attention.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.gpu import arrays, ceilings, mosaic, rivals, timers
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table, reason
from kernels.case import Case
from kernels.dispatch import Implementation
from kernels.equivalent import UnsuitableError
from kernels.errors import UnsupportedError

_Limits = tuple[float | None, float | None]
_Program = Callable[[], jax.stages.Compiled]  # or raises why there is none


def run(settings: Settings, tables: dict[str, Table], table: Table) -> None:
    """Time all cases; fractions are of the ceilings that this run measured."""
    limits = ceilings.of(tables)
    table.notes = {
        "implementation": settings.implementation,
        "mosaic": mosaic.unavailable(settings.mosaic) or settings.mosaic,
        "flops": "of visible (query, key) pairs, 2 per multiply-add",
        "bytes": "every input read once, every output written once",
    }
    cases = settings.timed_cases()
    for first in range(0, len(cases), settings.threads):
        some = cases[first : first + settings.threads]
        prepared = _prepared(settings, [case for _, (_, case) in some], table)
        for (name, (op, case)), parts in zip(some, prepared, strict=True):
            for _ in table.in_time([(name, case)]):
                row = table.attempt(name, functools.partial(_row, settings, case, *parts, limits))
                if row is not None:
                    table.add(name=name, op=op, dtype=case.dtype, **row)
            parts.clear()  # they hold arrays


def _prepared(settings: Settings, cases: list[Case], table: Table) -> list[list[Any]]:
    """Draw the arguments of some cases, and compile both kinds of kernel, all side by side.

    Nothing is timed meanwhile.
    """
    with concurrent.futures.ThreadPoolExecutor(3 * settings.threads) as pool:
        prepared = [
            [
                pool.submit(arrays.draw, case, 0),
                pool.submit(_compile, settings.implementation, case),
                pool.submit(_compile_mosaic, settings, case),
            ]
            for case in cases
        ]
        everything = [part for parts in prepared for part in parts]
        concurrent.futures.wait(everything, timeout=max(0.0, table.time_left))
        pool.shutdown(cancel_futures=True)
    return [[part.result for part in parts] for parts in prepared]


def _compile(implementation: Implementation, case: Case) -> jax.stages.Compiled:
    run = functools.partial(case.run, implementation=implementation)
    return timers.compiled(run, *case.shapes(), loops=timers.loops(case))


def _compile_mosaic(settings: Settings, case: Case) -> jax.stages.Compiled:
    if settings.alone:
        raise UnsupportedError("not asked for")
    return _compile(settings.mosaic, case)


def _row(
    settings: Settings,
    case: Case,
    draw: Callable[[], tuple[Any, ...]],
    program: _Program,
    of_mosaic: _Program,
    limits: _Limits,
) -> dict[str, Any]:
    arguments = draw()
    row: dict[str, Any]
    try:
        row = _timed(program(), case, arguments, settings.seconds_per_row, limits)
    except UnsupportedError as error:  # a jax without Triton still has Mosaic
        row = {"skipped": str(error)} | _work(case)
    row["mosaic"] = by_mosaic = _mosaic(settings, case, of_mosaic, arguments, limits)
    if "seconds" in row and "seconds" in by_mosaic:
        by_mosaic["speedup"] = row["seconds"]["median"] / by_mosaic["seconds"]["median"]
    ours = row if "seconds" in row else by_mosaic  # what others are compared with
    if "seconds" in ours and not settings.alone:
        row["rivals"] = _rivals(settings, case, arguments, ours["seconds"]["median"])
    return row


def _work(case: Case) -> dict[str, Any]:
    cost = case.cost()
    return {"flops": cost.flops, "bytes": cost.num_bytes}


def _timed(
    program: jax.stages.Compiled,
    case: Case,
    arguments: tuple[Any, ...],
    seconds: float,
    limits: _Limits,
) -> dict[str, Any]:
    time = timers.of_program(program, *arguments, seconds=seconds, loops=timers.loops(case))
    work = _work(case)
    row: dict[str, Any] = {
        "seconds": time,
        **work,
        "flops_per_second": work["flops"] / time["median"],
        "bytes_per_second": work["bytes"] / time["median"],
    }
    flops, num_bytes = limits
    if flops is not None and num_bytes is not None:
        floors = {"matmul": work["flops"] / flops, "copy": work["bytes"] / num_bytes}
        row["of_ceiling"] = {name: floor / time["median"] for name, floor in floors.items()}
        row["bound"] = max(floors, key=lambda name: floors[name])
    return row


def _mosaic(
    settings: Settings, case: Case, program: _Program, arguments, limits: _Limits
) -> dict[str, Any]:
    try:
        return _timed(program(), case, arguments, settings.seconds_per_row, limits)
    except UnsupportedError as error:
        return {"skipped": str(error)}
    except Exception as error:  # the other kernel is measured
        return {"failed": reason(error)}


def _rivals(settings: Settings, case: Case, arguments, seconds: float) -> dict[str, Any]:
    try:
        work = case.equivalent(arguments)
    except UnsuitableError as error:
        return {name: {"skipped": str(error)} for name in rivals.TIMERS}
    answers = {}
    for name, measure in rivals.TIMERS.items():
        try:
            time = measure(case, work, seconds=settings.seconds_per_row)
        except UnsuitableError as error:
            answers[name] = {"skipped": str(error)}
        except Exception as error:  # theirs; ours is measured
            answers[name] = {"skipped": reason(error)}
        else:
            answers[name] = {"seconds": time, "ours_is_faster_by": time["median"] / seconds}
            if work.note:
                answers[name]["note"] = work.note
    return answers
