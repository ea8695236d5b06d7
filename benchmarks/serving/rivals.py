"""Other libraries, each in a process of its own, on the same saved weights.

transformers runs in the environment of the benchmark (PyTorch is needed: `pip install '.[test]'`).
kvpress pins an older transformers, so it has an environment of its own:

    python3.11 -m venv .venv-kvpress
    .venv-kvpress/bin/pip install torch==2.13.0
    .venv-kvpress/bin/pip install kvpress==0.5.5 torch==2.13.0

A library that is not there is skipped, with a line that says so.
"""

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from duo_jax.reports import machine

Library = Literal["transformers", "kvpress"]

_ROOT = pathlib.Path(__file__).parents[2]
KVPRESS_PYTHON = pathlib.Path(".venv-kvpress/bin/python")


class RivalError(Exception):
    """A library could not be measured; the message is one line."""


class Rival:
    """A running worker (benchmarks.serving.rival_worker) with the model loaded."""

    def __init__(self, library: str, process: subprocess.Popen, log: pathlib.Path) -> None:
        self.library = library
        self._process, self._log = process, log
        self.versions: dict[str, str] = self._answer()

    def measure(self, what: str, **request: Any) -> dict[str, Any]:
        """Ask for a measurement, such as "decode", with the arguments of the worker's function.

        Raises:
          RivalError: the worker died; its last words are in the message.
        """
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"measure": what, **request}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = said[-1].strip() if said else "it said nothing"
        raise RivalError(f"{self.library} ended with code {code}: {last}")


@contextlib.contextmanager
def running(
    libraries: Sequence[Library], folder: pathlib.Path, *, dtype: str, kvpress_python: pathlib.Path
) -> Iterator[tuple[list[Rival], list[str]]]:
    """Start a worker per library; yield those that run, and one line for each that does not.

    Args:
      libraries: which ones.
      folder: a Hugging Face model.
      dtype: of weights and activations.
      kvpress_python: the interpreter of kvpress' environment.
    """
    rivals, skipped = [], []
    with contextlib.ExitStack() as stack:
        for library in libraries:
            try:
                python = _python(library, kvpress_python)
                rivals.append(stack.enter_context(_worker(library, python, folder, dtype)))
            except RivalError as error:
                skipped.append(f"{library} is skipped: {error}")
        yield rivals, skipped


def _python(library: str, kvpress_python: pathlib.Path) -> pathlib.Path:
    """Return the interpreter that has a library."""
    if jax.default_backend() != "cpu":
        raise RivalError("it is measured on CPU only")
    if library == "kvpress":
        if not kvpress_python.is_file():
            raise RivalError(
                f"there is no {kvpress_python}; make it as the docstring of "
                "benchmarks/serving/rivals.py says, or pass --kvpress-python"
            )
        return kvpress_python
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise RivalError(f"{' and '.join(missing)} not installed; pip install '.[test]'")
    return pathlib.Path(sys.executable)


@contextlib.contextmanager
def _worker(
    library: str, python: pathlib.Path, folder: pathlib.Path, dtype: str
) -> Iterator[Rival]:
    command = [str(python.absolute()), "-m", "benchmarks.serving.rival_worker", library]
    command += [str(folder.absolute()), dtype, str(machine.cores())]
    with started(library, command) as rival:
        yield rival


@contextlib.contextmanager
def started(library: str, command: Sequence[str]) -> Iterator[Rival]:
    """Start a worker and end it afterwards.

    Raises:
      RivalError: it died before it answered.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = pathlib.Path(scratch) / "stderr"
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                command, cwd=_ROOT, text=True, stderr=stderr,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as process,
        ):  # fmt: skip
            try:
                yield Rival(library, process, log)
            finally:
                process.kill()
