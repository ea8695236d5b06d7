"""Run steps of measuring a pretrained model, each in a process and a folder of its own."""

import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable

from benchmarks.real.steps import Step
from duo_jax import files


def run_missing(
    steps: Iterable[tuple[Step, pathlib.Path]], *, model: str, minutes: float | None = None
) -> list[str]:
    """Run what is not finished; return the names of the steps that failed.

    Args:
      steps: with the folders that they run in.
      model: the model, as python -m duo_jax.evaluate takes it.
      minutes: start no step later than this; None: run all.

    Raises:
      KeyboardInterrupt: Ctrl-C reached a step.
    """
    began, failed = time.monotonic(), []
    for step, folder in steps:
        late = minutes is not None and time.monotonic() - began > 60 * minutes
        if late or files.present(step.result(folder)):
            continue
        if not _run(step, model, folder):
            failed.append(step.name)
    return failed


def _run(step: Step, model: str, folder: pathlib.Path) -> bool:
    """Run a step; return whether it succeeded."""
    files.make_folder(folder)
    words = [sys.executable, "-m", "duo_jax.evaluate", *step.command(model, folder)]
    print(f"== {step.name}", flush=True)
    done = subprocess.run(words, check=False)
    if done.returncode in (130, 143):  # Ctrl-C reached it too
        raise KeyboardInterrupt
    return done.returncode == 0
