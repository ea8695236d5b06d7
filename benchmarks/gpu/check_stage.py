"""The stages that check every case, compiled by several threads: one for each kind of kernel.

They measure no time, so several processes may do parts of them side by side: tracing takes most of
it.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import time

from benchmarks.gpu import checks, mosaic
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table
from kernels.all_cases import named
from kernels.case import Case
from kernels.dispatch import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `parts` equal ones, counted from 1, of the cases."""

    number: int = 1
    parts: int = 1

    def named(self, stage: str) -> str:
        """Return the name of a stage that does this part alone."""
        return stage if self.parts == 1 else f"{stage}-{self.number}-of-{self.parts}"


def run(settings: Settings, part: Part, table: Table) -> None:
    """Check all cases of the first kind of kernel, or a part of them."""
    _run(settings.check_implementation, named(settings.checks), part, settings, table)


def run_mosaic(settings: Settings, part: Part, table: Table) -> None:
    """Check the cases that Mosaic kernels serve; none where they cannot run."""
    reason = mosaic.unavailable(settings.mosaic)
    cases = mosaic.served(settings.checks) if reason is None else {}
    _run(settings.mosaic, cases, part, settings, table)
    table.notes["unavailable"] = reason


def _run(
    implementation: Implementation,
    cases: dict[str, Case],
    part: Part,
    settings: Settings,
    table: Table,
) -> None:
    """Check cases, the small ones first; random inputs come from the clock."""
    seed = time.time_ns() % 2**31
    installed = importlib.util.find_spec("pytest") is not None
    table.notes = {
        "seed": seed,
        "implementation": implementation,
        "parts": part.parts,
        "run_by": "a loop over benchmarks.gpu.checks.check, which tests/kernels/test_gpu.py calls "
        f"too; pytest is {'installed, but not needed' if installed else 'not installed'}",
        "rule": f"error at most {checks.MAX_RATIO} x XLA's in the same dtype; poisoned outputs",
    }
    print(f"{table.name}: seed {seed}, {table.notes['run_by']}", flush=True)
    ordered = sorted(cases.items(), key=lambda item: item[1].compile_only)  # stable
    cases = dict(ordered[part.number - 1 :: part.parts])
    with concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        programs = {
            name: pool.submit(checks.compiled, case, implementation)
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
                    print(f"{table.name}: {name} FAILED: {row['problems'][0]}", flush=True)
        pool.shutdown(cancel_futures=True)  # nothing compiles beside what is timed later


def _check(case, program, seed):
    return checks.run(case, program.result(), seed=seed)
