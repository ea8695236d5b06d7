"""Jobs run in another process, which may die of them."""

import os
import sys

import jax
import pytest

from kernels.aot_process import Compiler, CompilerError


def describe(word: str) -> list:
    print("what a library prints")
    os.system("echo from another process")
    return [word, os.getpid(), jax.default_backend(), os.environ["XLA_FLAGS"]]


def abort() -> None:
    print("F0000 no such layout", file=sys.stderr, flush=True)
    os.abort()


def test_jobs_run_in_one_other_process_on_the_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with Compiler(xla_flags="--xla_force_host_platform_device_count=2") as compiler:
        first, second = (compiler.call(describe, word) for word in "ab")
    assert first[0] + second[0] == "ab"
    assert first[1] == second[1] != os.getpid()
    assert first[2:] == ["cpu", "--xla_force_host_platform_device_count=2"]
    with pytest.raises(ProcessLookupError):
        os.kill(first[1], 0)


@pytest.mark.slow
def test_a_job_that_ends_the_process_is_an_error_and_the_next_one_runs():
    with Compiler() as compiler:
        first = compiler.call(describe, "a")
        with pytest.raises(
            CompilerError, match=r"ended with code -6: (.|\n)*F0000 no such layout$"
        ):
            compiler.call(abort)
        second = compiler.call(describe, "b")
        assert first[1] != second[1]
        with pytest.raises(CompilerError, match=r"code 1: (.|\n)*TypeError: describe"):
            compiler.call(describe)
