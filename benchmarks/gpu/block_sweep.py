"""The stage that tries other tile sizes, and writes the best ones as JSON.

Its file is for a person to read: a configuration that wins here goes into the op's heuristic.py.
"""

import concurrent.futures
import dataclasses
import functools
from typing import Any

import jax

from benchmarks.gpu import arrays, mosaic, timers
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table, reason
from kernels import compat
from kernels.all_cases import served_by_mosaic
from kernels.case import Case

_MIN_GAIN = 1.02  # less is the spread of two measurements


def run(settings: Settings, table: Table) -> None:
    """Time the candidates of every real-size case; each has an equal part of the time."""
    table.notes = {
        "copy_to": "the heuristic.py that holds the kernel's sizes, where `gain` is worth it"
    }
    reason_against = mosaic.unavailable(settings.mosaic)
    table.notes["mosaic"] = reason_against or "kernels/mosaic/tiles.py holds its sizes"
    sweeps = []
    for name, (op, case) in settings.timed_cases():
        sweeps.append((name, (op, case, False)))
        if reason_against is None and served_by_mosaic(case) and not settings.alone:
            sweeps.append((f"mosaic, {name}", (op, case, True)))
    for left, (name, (op, case, by_mosaic)) in zip(
        range(len(sweeps), 0, -1), table.in_time(sweeps), strict=False
    ):
        end = table.time_left * (1 - 1 / left)
        sweep = functools.partial(_sweep, settings, case, table, end, by_mosaic=by_mosaic)
        row = table.attempt(name, sweep)
        if row is not None:
            table.add(name=name, op=op, dtype=case.dtype, **row)


def _sweep(
    settings: Settings, case: Case, table: Table, end: float, *, by_mosaic: bool
) -> dict[str, Any]:
    """Time candidates until `end` seconds of the stage are left."""
    implementation = settings.mosaic if by_mosaic else settings.implementation
    arguments = arrays.draw(case, 0)
    shapes = jax.eval_shape(lambda *tree: tree, *arguments)
    tried: list[dict[str, Any]] = []
    found = case.candidates(gpu=compat.tile_gpu(), mosaic=by_mosaic)
    found = found[: 2 if settings.smoke else None]
    loops = timers.loops(case)

    def compiled(tiles):
        function = functools.partial(case.run, implementation=implementation, tiles=tiles)
        return timers.compiled(function, *shapes, loops=loops)

    with concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        for first in range(0, len(found), settings.threads):
            if tried and table.time_left < end:
                break
            some = found[first : first + settings.threads]
            programs = [pool.submit(compiled, tiles) for tiles in some]
            # Nothing is timed while others compile: they would hold up its dispatch.
            concurrent.futures.wait(programs, timeout=max(1.0, table.time_left))
            for tiles, program in zip(some, programs, strict=True):
                row: dict[str, Any] = {"sizes": dataclasses.asdict(tiles)}
                try:
                    time = timers.of_program(
                        program.result(timeout=0.1),
                        *arguments,
                        seconds=settings.seconds_per_candidate,
                        loops=loops,
                        rounds=3,
                    )
                    row["seconds"] = time["median"]
                except Exception as error:  # does not compile, or does not fit
                    row["failed"] = reason(error)
                tried.append(row)
        pool.shutdown(cancel_futures=True)  # nothing compiles beside what is timed later
    timed = [row for row in tried if "seconds" in row]
    best = min(timed, key=lambda row: row["seconds"], default=None)
    default = tried[0]
    result: dict[str, Any] = {
        "case": dataclasses.asdict(case),
        "default": default,
        "best": best,
        "not_tried": len(found) - len(tried),
        "candidates": tried,
    }
    if best and "seconds" in default:
        result["gain"] = default["seconds"] / best["seconds"]
        result["worth_it"] = result["gain"] >= _MIN_GAIN
    return result
