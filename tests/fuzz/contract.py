"""What every reader promises: input is read rightly or refused in one line, at a bounded cost."""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from duo_jax.errors import InputError

REFUSED = object()
_MOST_SECONDS = 4.0  # of processor time, of which a machine that others use too takes twice as much
_MOST_MEMORY = 300 << 20  # bytes, above the size of the input
_LONGEST_MESSAGE = 2_200  # characters
# A quick pass in every run of the tests, a thorough one among the slow tests. Inputs repeat from
# run to run; another seed gives others: DUO_JAX_FUZZ_SEED=2 python -m pytest -m slow tests/fuzz
_SEED = int(os.environ.get("DUO_JAX_FUZZ_SEED", "1"))


def attempt(read: Callable[[], Any], *, size: int = 0) -> Any:
    """Return what a reader returns, or REFUSED if it raises an InputError.

    Args:
      read: calls the reader.
      size: bytes of its input.

    Raises:
      AssertionError: it took too long or too much memory, or its message is no line.
    """
    before = _reset_peak()
    started = time.process_time()
    try:
        found = read()
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, f"{len(message.splitlines())} lines: {message!r}"
        assert len(message) <= _LONGEST_MESSAGE
        found = REFUSED
    seconds, memory = time.process_time() - started, _peak() - before
    assert seconds < _MOST_SECONDS, f"{seconds:.1f} s"
    assert memory < _MOST_MEMORY + size, f"{memory >> 20} MB"
    return found


def fuzzed(
    cases: st.SearchStrategy[Any] | Callable[[], st.SearchStrategy[Any]],
    *,
    quick: int = 30,
    thorough: int = 10_000,
) -> Callable[[Callable], Callable]:
    """Make a test of a function that takes a case and a folder, from many cases.

    Args:
      cases: the strategy, or a function that makes it when the test runs.
      quick: number of cases in every run of the tests.
      thorough: number of cases among the slow tests.
    """
    numbers = [quick, pytest.param(thorough, marks=pytest.mark.slow)]

    def decorate(body: Callable[[Any, pathlib.Path], None]) -> Callable:
        @pytest.mark.filterwarnings("ignore:Generating overly large repr")
        @pytest.mark.parametrize("examples", numbers)
        def test(examples: int, tmp_path: pathlib.Path) -> None:
            tried = []
            strategy = cases if isinstance(cases, st.SearchStrategy) else cases()

            @hypothesis.seed(_SEED)
            @hypothesis.settings(
                max_examples=examples,
                database=None,
                deadline=None,  # `attempt` counts processor time
                phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(strategy)
            def run(case: Any) -> None:
                tried.append(None)
                body(case, tmp_path)

            run()
            assert len(tried) >= examples

        test.__doc__ = body.__doc__
        return test

    return decorate


def _reset_peak() -> int:
    """Forget the largest memory of this process so far; return what it has now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Return the largest memory of this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
