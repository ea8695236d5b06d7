"""The stage that serves whole models of random weights, full and split: decoding and prefill.

All programs are compiled first, side by side, since nothing can be timed while others compile. They
run from the one that needs the least memory to the one that needs the most: the device counts one
peak for the whole process, which tells of a program only if it rises.
"""

import concurrent.futures
import functools
import gc
from typing import Any, Protocol

import jax

from benchmarks.gpu import decode, memory, models, prefill
from benchmarks.gpu.models import Published
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table

_MOST_FOR_COMPILING = 0.5  # of the stage's time


class Program(Protocol):
    """Decoding or prefill with one way to split a model."""

    published: Published

    @property
    def name(self) -> str:
        """Name in lists of what was not reached, and of failures."""
        ...

    def needed_bytes(self) -> int:
        """Return the bytes of its parameters and caches."""
        ...

    def expected_seconds(self, table: Table) -> float:
        """Guess how long it will be measured, from the rows there are."""
        ...

    def compile(self) -> Any:
        """Compile it, without arrays; the result tells its `temp_bytes`."""
        ...

    def measure(self, compiled: Any, params: dict[str, Any], table: Table) -> None:
        """Add its rows."""
        ...


def run(settings: Settings, table: Table) -> None:
    """Measure all programs that fit the device and the time."""
    table.notes = {
        "implementation": settings.implementation,
        "caches": "decoding: filled with random numbers; prefill: random tokens, read whole",
        "weights": "random",
        "memory": "peak_bytes: the device's own count, where this program raised it; "
        "counted_bytes: arrays and the program's workspace. Of a program's longest context",
        "decode": f"median of {settings.decode_rounds} rounds of {settings.decode_steps} tokens, "
        "dispatched one after the other",
        "mode": settings.mode,
    }
    programs = _fitting(settings, table)
    compiled = _compile(settings, programs, table)

    def peak_bytes(program: Program) -> int:
        future = compiled[program.name]
        known = _is_done(future) and future.exception() is None
        return program.needed_bytes() + (future.result().temp_bytes if known else 0)

    programs.sort(key=peak_bytes)
    of_model: Published | None = None
    params: dict[str, Any] | None = None
    for index, program in enumerate(programs):
        expected = program.expected_seconds(table)
        later = [other.expected_seconds(table) for other in programs[index + 1 :]]
        # What comes later and is quicker is not given up for it.
        spare = table.time_left - sum(seconds for seconds in later if seconds < expected)
        if expected > spare:
            left = max(0.0, spare)
            table.not_reached.append(f"{program.name}: about {expected:.0f} s, {left:.0f} s left")
            continue
        future = compiled.pop(program.name)
        if not _is_done(future):
            table.not_reached.append(f"{program.name}: still compiling")
            continue
        if program.published is not of_model:
            params = None  # before the next model's are made
            gc.collect()
            of_model, params = program.published, _params(settings, program.published)

        table.attempt(program.name, functools.partial(_measure, program, future, params, table))
        del future
        gc.collect()
        for published in settings.models:
            rows = [row for row in table.rows if row.get("model") == published.name]
            decode.compare(published, [row for row in rows if row["what"] == decode.WHAT])
            prefill.compare(published, [row for row in rows if row["what"] == prefill.WHAT])
        table.write()


def _fitting(settings: Settings, table: Table) -> list[Program]:
    """Return the programs that fit the device's memory; list the others."""
    found: list[Program] = []
    for published in settings.models:
        duo, full = published.variants
        for variant, contexts in (
            (duo, published.contexts),
            (full, published.contexts),
            (duo, published.duo_contexts),
        ):
            candidates = [
                decode.Decoding(
                    settings=settings, published=published, variant=variant, contexts=(context,)
                )
                for context in contexts
            ]
            fitting = [x.contexts[0] for x in candidates if _fits(x, table)]
            if fitting:
                found.append(
                    decode.Decoding(
                        settings=settings,
                        published=published,
                        variant=variant,
                        contexts=tuple(fitting),
                    )
                )
        for variant in (duo, full):
            program = prefill.Prefill(settings=settings, published=published, variant=variant)
            if _fits(program, table):
                found.append(program)
    return found


def _fits(program: Program, table: Table) -> bool:
    needed, limit = program.needed_bytes(), memory.limit() or 0
    if memory.fits(needed):
        return True
    table.not_reached.append(f"{program.name}: needs {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB")
    return False


def _compile(
    settings: Settings, programs: list[Program], table: Table
) -> dict[str, concurrent.futures.Future]:
    """Start compiling all programs, and wait while there is time for it."""
    if table.time_left <= 0:
        return {program.name: concurrent.futures.Future() for program in programs}
    pool = concurrent.futures.ThreadPoolExecutor(settings.threads)
    futures = {program.name: pool.submit(program.compile) for program in programs}
    concurrent.futures.wait(futures.values(), timeout=_MOST_FOR_COMPILING * table.time_left)
    pool.shutdown(wait=False, cancel_futures=True)
    return futures


def _is_done(future: concurrent.futures.Future) -> bool:
    return future.done() and not future.cancelled()


def _params(settings: Settings, published: Published) -> dict[str, Any]:
    return jax.block_until_ready(models.random_params(published.model, settings.dtype))


def _measure(program: Program, future, params, table: Table) -> None:
    program.measure(future.result(), params, table)
