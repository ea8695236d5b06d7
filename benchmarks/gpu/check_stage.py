"""The stage that checks every case, compiled by several threads."""

import concurrent.futures
import functools
import importlib.util
import time

from benchmarks.gpu import checks, mosaic
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table
from kernels.all_cases import named
from kernels.dispatch import Implementation


def run(settings: Settings, table: Table) -> None:
    """Check all cases, the small ones first; random inputs come from the clock."""
    seed = time.time_ns() % 2**31
    installed = importlib.util.find_spec("pytest") is not None
    table.notes = {
        "seed": seed,
        "implementation": settings.check_implementation,
        "mosaic": mosaic.unavailable(settings.mosaic) or settings.mosaic,
        "run_by": "a loop over benchmarks.gpu.checks.check, which tests/kernels/test_gpu.py calls "
        f"too; pytest is {'installed, but not needed' if installed else 'not installed'}",
        "rule": f"error at most {checks.MAX_RATIO} x XLA's in the same dtype; poisoned outputs",
    }
    print(f"checks: seed {seed}, {table.notes['run_by']}", flush=True)
    by: dict[str, Implementation] = {}
    cases = named(settings.checks)
    by |= dict.fromkeys(cases, settings.check_implementation)
    if mosaic.unavailable(settings.mosaic) is None:
        more = mosaic.served(settings.checks)
        by |= dict.fromkeys(more, settings.mosaic)
        cases |= more
    cases = dict(sorted(cases.items(), key=lambda item: item[1].compile_only))  # stable
    with concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        programs = {
            name: pool.submit(checks.compiled, case, by[name])
            for name, case in cases.items()
            if table.time_left > 0
        }
        for i, (name, case) in enumerate(table.in_time(cases.items())):
            program = programs.pop(name)
            concurrent.futures.wait([program], timeout=max(0.0, table.time_left))
            if not program.done():
                table.not_reached.append(name)
                continue
            row = table.attempt(name, functools.partial(_check, case, program, seed + i))
            if row is not None:
                table.add(name=name, dtype=case.dtype, **row)
                if not row["passed"]:
                    print(f"checks: {name} FAILED: {row['problems'][0]}", flush=True)
        pool.shutdown(cancel_futures=True)  # nothing compiles beside what is timed later


def _check(case, program, seed):
    return checks.run(case, program.result(), seed=seed)
