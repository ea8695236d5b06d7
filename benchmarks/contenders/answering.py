"""A contender's process: every line of JSON on its standard input gets one as its answer.

It may run in an environment that has neither jax nor duo_jax, so it imports nothing but the
standard library. benchmarks.serving.rivals starts such processes and asks them.
"""

import contextlib
import json
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

_PROC = pathlib.Path("/proc/self")


class Contender(Protocol):
    """A model that is loaded and runs greedily, one row at a time."""

    versions: dict[str, str]

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """Read a prompt from the beginning; yield `count` tokens, each when it is known."""
        ...

    def warm_up(self, tokens: list[int], count: int) -> None:
        """Do once what only the first `generate` of such arguments does, as compiling."""
        ...

    def step_bytes(self, context: int) -> int:
        """Return the bytes that a step reads after `context` tokens: weights, keys and values."""
        ...


def answer(load: Callable[[dict[str, Any]], Contender]) -> None:
    """Load what the command line's JSON asks for, say its versions, answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    contender = load(json.loads(sys.argv[1]))
    print(json.dumps(contender.versions), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measure = {"warm_up": _warm_up, "generate": _generate}[request.pop("measure")]
        print(json.dumps(measure(contender, **request)), file=answers, flush=True)


def _warm_up(contender: Contender, *, tokens: list[int], count: int) -> dict[str, Any]:
    contender.warm_up(tokens, count)
    return {"peak_bytes": _peak_bytes()}


def _generate(contender: Contender, *, tokens: list[int], count: int) -> dict[str, Any]:
    """Time the prompt, until the first token is known, and the tokens after it."""
    _forget_peak()
    began = read = time.perf_counter()
    written = []
    for token in contender.generate(tokens, count):
        if not written:
            read = time.perf_counter()
        written.append(token)
    ended = time.perf_counter()
    return {
        "prefill_seconds": read - began,
        "decode_seconds": ended - read,
        "tokens": written,
        "step_bytes": contender.step_bytes(len(tokens) + count // 2),
        "peak_bytes": _peak_bytes(),
    }


def _forget_peak() -> None:
    """Let the peak begin anew, where Linux can."""
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Return the most memory that the process has held since its peak was forgotten.

    What getrusage says begins with the memory of the process that started this one.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text())
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
