"""Compile in another process: some programs abort the compiler.

Where there is a GPU, this process would compile for it instead.

    with Compiler() as compiler:
        compiler.call(peak_bytes, "decode", 1_000_000)  # a function of a module, arguments as JSON

The process has jax on the CPU, runs one job after the other, and is started again after a job that
ended it. It runs this module: a job goes in as a line of JSON, [module, function, arguments], and
its result comes out as another.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

_MAX_ERROR = 2000  # characters


class CompilerError(RuntimeError):
    """A job ended its process; the message is the end of what the process printed."""


class Compiler(contextlib.AbstractContextManager):
    """A process that compiles; it starts with the first job and ends with the context."""

    def __init__(self, *, xla_flags: str = "") -> None:
        """Describe the process; `xla_flags` are all of its XLA_FLAGS."""
        self._environment = os.environ | {
            # Modules are found where this process finds them, in whatever folder it runs.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_FLAGS": xla_flags,
        }
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of an importable module returns in the other process.

        Raises:
          CompilerError: the process ended instead.
        """
        process = self._process or self._start()
        # The module that `python -m` runs is called __main__; its spec has the name to import.
        module = sys.modules[function.__module__].__spec__
        name = function.__module__ if module is None else module.name
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, function.__name__, arguments]), file=process.stdin, flush=True)
        line = process.stdout.readline() if process.stdout else ""
        if line:
            return json.loads(line)
        raise CompilerError(self._end())

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        return self._process

    def _end(self) -> str:
        """Wait for the process; return how it ended."""
        assert self._process is not None
        assert self._log is not None
        with contextlib.suppress(BrokenPipeError), self._process:
            code = self._process.wait()
        with self._log:
            self._log.seek(0)
            said = self._log.read().strip()[-_MAX_ERROR:]
        self._process = None
        return f"the process ended with code {code}: {said or 'it said nothing'}"


def _main() -> None:
    # Whatever a job or a library prints is no result.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        result = getattr(importlib.import_module(module), function)(*arguments)
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    _main()
