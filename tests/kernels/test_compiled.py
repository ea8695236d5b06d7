"""Every kernel compiles for A100 and H200 without spilling a register, on a machine without one."""

import pytest

from kernels.all_cases import CASES, named
from kernels.aot_process import Compiler, CompilerError
from tests.kernels import compile_worker

TARGETS = ("a100", "h200")


def compile_all(compiler: Compiler, target: str, names: list[str]) -> dict[str, str | None]:
    """Compile cases; return every one's complaint, None for none."""
    found = {}
    for name in names:
        try:
            found[name] = compiler.call(compile_worker.complaint, target, name)
        except CompilerError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", CASES)
def test_named_cases_compile_without_spilling(compiler, op, target):
    names = [name for name in named() if name.startswith(f"{op}:")]
    assert len(names) > 5
    assert compile_all(compiler, target, names) == dict.fromkeys(names)


@pytest.mark.parametrize("target", TARGETS)
def test_a_selection_of_head_dims_and_dtypes_compiles_without_spilling(compiler, target):
    names = ["decode: 80 x float32", "prefill: 96 x float16", "prefill: 256 x float32",
             "chunk: 128 x float32", "chunk: 256 x bfloat16", "gradient: 64 x float32",
             "gradient: 80 x float32", "gradient: 256 x float32"]  # fmt: skip
    assert compile_all(compiler, target, names) == dict.fromkeys(names)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", compile_worker.HEAD_DIMS)
def test_every_head_dim_and_dtype_compiles_without_spilling(compiler, head_dim, target):
    names = [name for name in compile_worker.grid() if f": {head_dim} x" in name]
    assert len(names) == 15
    assert compile_all(compiler, target, names) == dict.fromkeys(names)


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_that_do_not_fit_are_reported(compiler, target):
    complaints = compile_all(compiler, target, ["spills", "shared memory"])
    assert "register spilling" in complaints["spills"]
    assert "shared memory" in complaints["shared memory"].lower()
