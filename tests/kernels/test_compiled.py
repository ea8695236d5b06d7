"""Every kernel compiles for A100 and H200 without spilling a register, on a machine without one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.kernels import compile_worker

ROOT = pathlib.Path(__file__).parents[2]
TARGETS = ("a100", "h200")
OPS = ("decode", "decode_packed", "full", "merge", "prefill", "prefill_packed", "streaming")


def compile_all(target: str, names: list[str]) -> dict[str, str | None]:
    """Compile cases in another process; return every one's complaint, None for none."""
    # Without the flags of conftest.py: kernels that are not optimised do spill.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_worker", target, *names],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    results = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    for name in names:
        if name not in results:
            results[name] = f"the compiler ended with code {done.returncode}: {done.stderr[-500:]}"
            break
    return results


pytestmark = pytest.mark.usefixtures("gpu_compiler")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_named_cases_compile_without_spilling(op, target):
    names = [name for name in compile_worker.named_cases() if name.startswith(f"{op},")]
    assert len(names) > 5
    assert compile_all(target, names) == dict.fromkeys(names)


@pytest.mark.parametrize("target", TARGETS)
def test_a_selection_of_head_dims_and_dtypes_compiles_without_spilling(target):
    names = ["decode, 80 x float32", "prefill, 96 x float16", "prefill, 256 x float32",
             "chunk, 128 x float32", "chunk, 256 x bfloat16", "gradient, 64 x float32",
             "gradient, 80 x float32", "gradient, 256 x float32"]  # fmt: skip
    assert compile_all(target, names) == dict.fromkeys(names)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", compile_worker.HEAD_DIMS)
def test_every_head_dim_and_dtype_compiles_without_spilling(head_dim, target):
    names = [name for name in compile_worker.grid() if f", {head_dim} x" in name]
    assert len(names) == 15
    assert compile_all(target, names) == dict.fromkeys(names)


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_that_do_not_fit_are_reported(target):
    complaints = compile_all(target, ["spills", "shared memory"])
    assert "register spilling" in complaints["spills"]
    assert "shared memory" in complaints["shared memory"].lower()


def test_a_compiler_that_dies_is_reported():
    (line,) = compile_all("no such target", ["decode, one token"]).values()
    assert "no such target" in line
