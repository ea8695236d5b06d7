"""CPU-seconds of the whole generate command: the first time, and with the programs that it kept.

Each run is a process of its own; the folder for compiled programs is new and empty.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from benchmarks import command
from duo_jax.checkpoints import pretrained
from duo_jax.cli.compile_cache import VARIABLE
from duo_jax.errors import InputError
from duo_jax.reports import machine, markdown
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count

_PARTS = ("import", "load", "trace", "compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstTokenFlags:
    """What is generated."""

    model: str = pretrained.DEMO
    """A model as python -m duo_jax.generate takes it."""
    pattern: str | None = None
    """Its pattern, as there; "none" for full caches."""
    prompt: str = "The capital of France is"
    """The text to continue. A model that ends it at once compiles no decode step: look at the
    number of tokens written."""
    max_new_tokens: Count = 20
    """Tokens to write."""
    warm: Count = 1
    """Runs after the first one."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the command."""

    cpu: float  # CPU-seconds, of the processes that it starts too
    wall: float
    parts: dict[str, float]  # seconds, as benchmarks.timed_generate takes them
    summary: str  # the command's own last line


def measure(flags: FirstTokenFlags) -> list[Run]:
    """Run the command with an empty folder of programs, then with what that run has kept.

    Raises:
      InputError: the command fails.
    """
    words = ["--model", flags.model, "--prompt", flags.prompt]
    words += ["--max-new-tokens", str(flags.max_new_tokens)]
    if flags.pattern is not None:
        words += ["--pattern", flags.pattern]
    with tempfile.TemporaryDirectory() as folder:
        return [_run(words, pathlib.Path(folder)) for _ in range(1 + flags.warm)]


def _run(words: list[str], folder: pathlib.Path) -> Run:
    report = folder / "parts.json"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment[VARIABLE] = str(folder / "programs")
    before, began = _cpu_of_children(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.timed_generate", str(report), *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wall, cpu = time.monotonic() - began, _cpu_of_children() - before
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise InputError(f"the command failed: {last.removeprefix('error: ')}")
    parts = json.loads(report.read_text())
    return Run(cpu=cpu, wall=wall, parts=parts, summary=last)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def to_markdown(runs: list[Run]) -> str:
    """Return the table, and the summaries of the command."""
    names = ["cold", *(f"warm {i}" if len(runs) > 2 else "warm" for i in range(1, len(runs)))]
    rows = [
        (name, f"{run.cpu:.1f}", *(f"{run.parts[part]:.1f}" for part in _PARTS), f"{run.wall:.1f}")
        for name, run in zip(names, runs, strict=True)
    ]
    parts = ("importing", "loading", "tracing, by the clock", "compiling, by the clock")
    header = ("run", "CPU-seconds", *parts, "by the clock")
    return "\n".join([markdown.table(header, rows), "", *(run.summary for run in runs)])


def main(flags: FirstTokenFlags) -> None:
    """Print the table."""
    print(to_markdown(measure(flags)))
    print(machine.command("benchmarks.first_token"))


if __name__ == "__main__":
    command.run(main, FirstTokenFlags)
