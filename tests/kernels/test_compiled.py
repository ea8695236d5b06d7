"""Every kernel compiles for A100 and H200 without spilling a register, on a machine without one.

By default half of those of real size, and the hardest of every op. Of these, a named case whose
program is, to the letter, one that `python -m benchmarks.compiled` has compiled is not compiled
again. The slow tests compile all.
"""

import functools
import itertools
import json
import pathlib

import jax
import pytest

from benchmarks import compiled
from benchmarks.compile import worker
from kernels import aot
from kernels.all_cases import CASES, named
from kernels.aot_process import Compiler, CompilerError
from kernels.case import Case
from kernels.decode.cases import DecodeCase
from kernels.full.cases import FullCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import AttentionTiles

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
# The hardest of every op; the slow tests compile the whole grid.
SELECTION = ("decode: 80 x float32", "prefill: 256 x float32", "chunk: 256 x bfloat16")
SELECTION += ("gradient: 256 x float32",)


@functools.cache
def grid() -> dict[str, Case]:
    """Return every op at every head_dim and dtype; no length is a multiple of a tile."""
    cases = {}
    for head_dim, dtype in itertools.product(HEAD_DIMS, DTYPES):
        sizes = {"q_heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
        cases |= {
            f"{op}: {head_dim} x {dtype}": case
            for op, case in {
                "decode": DecodeCase(lengths=(2999,), slots=3001, **sizes),
                "prefill": PrefillCase(starts=(1001,), length=517, slots=3001, **sizes),
                "chunk": StreamingCase(length=517, lengths=(1001,), **sizes),
                "gradient": StreamingCase(length=517, gradient=True, **sizes),
                "full gradient": FullCase(length=517, gradient=True, **sizes),
            }.items()
        }
    return cases


def hopeless() -> dict[str, tuple[Case, AttentionTiles]]:
    """Return cases with tile sizes that no GPU can hold: the check must report them.

    Prefill walks once; streaming attention takes three times as long to compile.
    """
    sizes = {"q_heads": 8, "kv_heads": 2, "dtype": "float32"}
    case = PrefillCase(starts=(1001,), length=517, slots=3001, **sizes)
    small, large = ({"block_q": n, "block_kv": n} for n in (64, 128))
    return {
        "spills": (case, AttentionTiles(**small, num_warps=4, num_stages=1)),
        "shared memory": (case, AttentionTiles(**large, num_warps=8, num_stages=3)),
    }


def complaint(target: aot.Target, name: str, compiled_before: str | None) -> str | None:
    """Return what the compiler has against a case; None if it is compiled without spilling.

    None, too, if `compiled_before` is the fingerprint of its program.
    """
    cases = {name: (case, None) for name, case in {**named(), **grid()}.items()}
    case, tiles = (cases | hopeless())[name]
    try:
        lowered = worker.lower(case, target, tiles=tiles)
        if aot.fingerprint(target, lowered) != compiled_before:
            aot.compile_lowered(lowered, options=worker.NO_SPILLS)
    except Exception as error:  # whatever it is, it is this case's result
        return " ".join(str(error).split())[-500:]
    return None


def complaints(
    compiler: Compiler, target: str, names: list[str], compiled_before: dict[str, str] | None = None
) -> dict[str, str]:
    """Return what the compiler says of the cases that it does not compile."""
    found = {}
    for name in names:
        try:
            said = compiler.call(complaint, target, name, (compiled_before or {}).get(name))
        except CompilerError as error:
            said = str(error)
        if said is not None:
            found[name] = said
    return found


@functools.cache
def compiled_before(target: str) -> dict[str, str]:
    """Return the fingerprints of the programs that the committed run compiled with this jax."""
    file = pathlib.Path(__file__).parents[2] / compiled.RESULT
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["jax"] != jax.__version__:
        return {}
    return {
        f"{row['op']}: {row['case']}": row["text"]
        for row in result["rows"]
        if row["target"] == target and row["error"] is None
    }


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("op", CASES)
def test_named_cases_compile_without_spilling(compiler, op, target):
    """Nearly all of the time goes into lowering: half of the cases, each for one target.

    Those of packed caches alternate by shape, then by format: all of both are there.
    """
    names = [f"{op}: {name}" for name, case in CASES[op].items() if case.compile_only]
    is_first = target == compiled.TARGETS[0]
    names = names[::4] if is_first else (names[3::4] or names[-1:])
    assert complaints(compiler, target, names, compiled_before(target)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("op", CASES)
def test_named_cases_compile_again(compiler, op, target):
    assert complaints(compiler, target, [f"{op}: {name}" for name in CASES[op]]) == {}


@pytest.mark.slow
def test_a_selection_of_head_dims_and_dtypes_compiles_without_spilling(compiler):
    assert complaints(compiler, "a100", list(SELECTION)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_dtype_compiles_without_spilling(compiler, head_dim, target):
    names = [name for name in grid() if f": {head_dim} x" in name]
    assert len(names) == 15
    assert complaints(compiler, target, names) == {}


@pytest.mark.slow
def test_tiles_that_do_not_fit_are_reported(compiler):
    found = complaints(compiler, "a100", list(hopeless()), {"spills": "of another program"})
    assert "register spilling" in found["spills"]
    assert "shared memory" in found["shared memory"].lower()
