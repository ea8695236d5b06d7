"""The stage that serves whole models of random weights, full and split: decoding and prefill.

All programs are compiled first, side by side, since nothing can be timed while others compile. They
run from the one that needs the least memory to the one that needs the most: the device counts one
peak for the whole process, which tells of a program only if it rises.
"""

import concurrent.futures
import functools
import gc
from typing import Any

import jax

from benchmarks.gpu import decode, memory, models, prefill
from benchmarks.gpu.models import Published
from benchmarks.gpu.program import Program
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table

_MOST_FOR_COMPILING = 0.5  # of the stage's time


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

    weights, peaks = _Weights(settings), {x.name: peak_bytes(x) for x in programs}
    programs.sort(key=lambda program: peaks[program.name])
    queue = [program for program in programs if _fits(program, peaks[program.name], table)]
    while queue:
        program = queue.pop(0)
        expected, left = _expected_seconds(program, queue, table), max(0.0, table.time_left)
        if expected > left:
            table.not_reached.append(
                f"{program.name}: about {expected:.0f} s with what it is compared with and what is "
                f"quicker, {left:.0f} s left"
            )
            pair = [other for other in queue if _is_pair(program, other)]
            table.not_reached += [f"{other.name}: as {program.name}" for other in pair]
            queue = [other for other in queue if other not in pair]
            continue
        future = compiled.pop(program.name)
        if not _is_done(future):
            table.not_reached.append(f"{program.name}: still compiling")
            continue
        table.attempt(program.name, functools.partial(_measure, program, future, weights, table))
        del future
        gc.collect()
        for published in settings.models:
            rows = [row for row in table.rows if row.get("model") == published.name]
            decode.compare(published, [row for row in rows if row["what"] == models.DECODE])
            prefill.compare(published, [row for row in rows if row["what"] == models.PREFILL])
        table.write()


class _Weights:
    """The parameters of one model at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._published: Published | None = None
        self._params: dict[str, Any] = {}

    def of(self, published: Published) -> dict[str, Any]:
        if published is not self._published:
            self._published, self._params = None, {}  # before the next model's are made
            gc.collect()
            self._params = jax.block_until_ready(
                models.random_params(published.architecture, self._settings.dtype)
            )
            self._published = published
        return self._params


def _is_pair(program: Program, other: Program) -> bool:
    """Whether they read the same prompt: one time without the other gives no speed-up."""
    return (
        isinstance(program, prefill.Prefill)
        and isinstance(other, prefill.Prefill)
        and program.published is other.published
    )


def _expected_seconds(program: Program, later: list[Program], table: Table) -> float:
    """Guess the time of a program, of its pair, and of what comes later and is quicker than both.

    Those are not given up for it.
    """
    pair = [other for other in later if _is_pair(program, other)]
    own = sum(other.expected_seconds(table) for other in (program, *pair))
    others = [other.expected_seconds(table) for other in later if other not in pair]
    return own + sum(seconds for seconds in others if seconds < own)


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
            fitting = [x.contexts[0] for x in candidates if _fits(x, x.needed_bytes(), table)]
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
            if _fits(program, program.needed_bytes(), table):
                found.append(program)
    return found


def _fits(program: Program, num_bytes: int, table: Table) -> bool:
    if memory.fits(num_bytes):
        return True
    limit = memory.limit() or 0
    table.does_not_fit.append(
        f"{program.name}: needs {num_bytes / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
    )
    return False


def _compile(
    settings: Settings, programs: list[Program], table: Table
) -> dict[str, concurrent.futures.Future[Any]]:
    """Compile all programs; those that the time does not reach are not begun."""
    if table.time_left <= 0:
        return {program.name: concurrent.futures.Future() for program in programs}
    with concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        futures = {program.name: pool.submit(program.compile) for program in programs}
        concurrent.futures.wait(futures.values(), timeout=_MOST_FOR_COMPILING * table.time_left)
        pool.shutdown(cancel_futures=True)  # nothing compiles beside what is timed
    return futures


def _is_done(future: concurrent.futures.Future[Any]) -> bool:
    return future.done() and not future.cancelled()


def _measure(
    program: Program, future: concurrent.futures.Future[Any], weights: _Weights, table: Table
) -> None:
    program.measure(future.result(), weights.of(program.published), table)
