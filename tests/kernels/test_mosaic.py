"""The Mosaic kernels: run on a CPU with race detection, compiled for an H200, refused by name.

They run in a process of their own, which has a thread for every warpgroup. By default the smaller
cases of every op; the slow tests run all.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks import compiled_mosaic
from benchmarks.compile import mosaic
from kernels import compat
from kernels.all_cases import AWKWARD, named, served_by_mosaic
from kernels.aot_process import Compiler
from kernels.case import AttentionCase, Case
from kernels.decode.cases import DecodeCase
from kernels.mosaic import gradient
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import AttentionTiles, DecodeTiles, ForwardBackwardTiles

pytestmark = pytest.mark.core

needs_mosaic = pytest.mark.skipif(
    compat.no_mosaic() is not None, reason=f"Mosaic {compat.no_mosaic()}"
)
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 64}
ROOT = pathlib.Path(__file__).parents[2]
H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"
ONE_HEAD = {"q_heads": 1, "kv_heads": 1, "head_dim": 64}
WIDE = HEADS | {"head_dim": 128}
MORE = {
    "decode, pages of 64": DecodeCase(lengths=(130, 0, 64), slots=192, page_size=64, **HEADS),
    "decode, pages of 128": DecodeCase(lengths=(255,), slots=256, page_size=128, **HEADS),
    "prefill, pages of 64": PrefillCase(
        starts=(100, 3), length=20, slots=128, page_size=64, **HEADS
    ),
    "decode, int8": DecodeCase(lengths=(130, 0), slots=192, bits=8, **HEADS),
    "decode, int8, head_dim 128": DecodeCase(lengths=(130,), slots=192, bits=8, **WIDE),
    "prefill, int4, pages of 64": PrefillCase(
        starts=(100,), length=20, slots=128, bits=4, page_size=64, **WIDE
    ),
    "prefill, int8": PrefillCase(starts=(30, 0), length=70, slots=128, bits=8, **HEADS),
    "decode, int4": DecodeCase(lengths=(130, 0), slots=192, bits=4, **WIDE),
    "decode, int4, pages of 64": DecodeCase(
        lengths=(100,), slots=128, bits=4, page_size=64, **WIDE | {"dtype": "float16"}
    ),
}


CASES = MORE | {
    name: case for name, case in named().items() if served_by_mosaic(case) and not case.compile_only
}
# Lengths where blocks and windows begin and end, which the other kernels take in float32.
CASES |= {
    f"{name}, bfloat16": dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    for name, case in named(AWKWARD).items()
    if isinstance(case, AttentionCase) and not case.gradient and case.head_dim == 16
}
# Interpretation takes seconds for each.
DEFAULT = {
    "decode: one token",
    "decode: empty rows",
    "full: three tokens",
    "prefill: three tokens, ragged",
    "streaming: one token before the sinks' end",
    "decode, pages of 64",
    "decode, int8, head_dim 128",
    "decode, int4, pages of 64",
    "prefill, int4, pages of 64",
    "prefill, pages of 64",
}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in DEFAULT else [pytest.mark.slow]


def run(case, arguments, tiles=None):
    call = functools.partial(case.run, implementation="interpret_mosaic", tiles=tiles)
    return jax.block_until_ready(jax.jit(call)(*arguments))


def error(got, want) -> float:
    got = np.asarray(got, np.float64)
    return np.abs(np.subtract(got, want, out=np.zeros_like(got), where=got != want)).max()  # -inf


def check(case, arguments, results):
    """The output errs at most twice as much as a program of its dtype, the lse as float32 does.

    Packed keys and values are rounded to that dtype, as XLA rounds them.
    """
    wanted = case.expected(arguments)
    assert [x.shape for x in results] == [x.shape for x in wanted]
    assert results[0].dtype == jnp.dtype(case.dtype)
    if case.bits is not None:
        other = case.run(*arguments, implementation="xla")
        allowed = [2 * error(x, want) for x, want in zip(other, wanted, strict=True)]
    else:
        rounded = case.expected(arguments, rounded_to=case.dtype)
        allowed = [2 * error(rounded[0], wanted[0]), 1e-5]
    for got, want, most in zip(results, wanted, allowed, strict=False):
        assert error(got, want) <= most + 2e-6, (error(got, want), most)


def two_stages(block_q: int) -> AttentionTiles:
    return AttentionTiles(block_q=block_q, block_kv=64, num_warps=12, num_stages=2)


def poisoned(arguments, axis: int, first: int, end: int):
    """Return arguments with NaN for some of the keys and values."""
    q, k, v, *rest = arguments
    where = (slice(None),) * axis + (slice(first, end),)
    return q, *(x.at[where].set(jnp.nan) for x in (k, v)), *rest


def matches_float64(name: str) -> None:
    case = CASES[name]
    arguments = case.draw()
    check(case, arguments, run(case, arguments))


def decode_stays_within_a_row() -> None:
    case = DecodeCase(lengths=(200,), slots=320, **HEADS)
    arguments = case.draw()
    for splits in (1, 3):  # one of them walks more tiles than there are stages
        tiles = DecodeTiles(block_kv=64, num_splits=splits, num_warps=8, num_stages=2)
        check(case, arguments, run(case, poisoned(arguments, 2, 256, 320), tiles))


def prefill_stays_before_the_diagonal() -> None:
    case = PrefillCase(starts=(130,), length=70, slots=320, **ONE_HEAD)
    arguments = case.draw()
    check(case, arguments, run(case, poisoned(arguments, 2, 256, 320), two_stages(128)))


def streaming_leaves_the_middle_out() -> None:
    case = StreamingCase(length=200, sink_size=3, recent_size=5, **ONE_HEAD)
    arguments = case.draw()
    tiles = ForwardBackwardTiles(forward=two_stages(64), backward=two_stages(64))
    results = run(case, arguments, tiles)
    check(case, arguments, results)
    # The windows of the last eight queries begin in the tile of tokens 128 to 191.
    others = run(case, poisoned(arguments, 1, 3, 128), tiles)
    for got, want in zip(others, results, strict=True):
        np.testing.assert_array_equal(got[:, 192:], want[:, 192:])


def a_race_is_an_error() -> None:
    """Tiles are overwritten while they may still be read."""
    plgpu = compat.mosaic()
    wait = plgpu.barrier_wait
    # Only the loader waits for two arrivals: both warpgroups have read a tile.
    plgpu.barrier_wait = lambda x: None if x.dtype.num_arrivals == 2 else wait(x)
    case = PrefillCase(starts=(130,), length=70, slots=200, **ONE_HEAD)
    with pytest.raises(Exception, match="RACE DETECTED"):
        run(case, case.draw(), two_stages(128))


def complaint(check: str, *arguments: str) -> str | None:
    """Return what is wrong, in a process that has threads for all warpgroups; None if nothing."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        globals()[check](*arguments)
    except Exception:
        return traceback.format_exc()[-3000:]
    return None


@pytest.fixture(scope="module")
def cpu():
    """Return a process whose XLA has threads for all warpgroups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PJRT_NPROC", str(2 * compat.INTERPRETER_THREADS))
        process = Compiler()
    with process:
        yield process


@needs_mosaic
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_a_kernel_matches_float64_without_a_data_race(cpu, name):
    assert cpu.call(complaint, "matches_float64", name) is None


@needs_mosaic
@pytest.mark.parametrize(
    "check",
    [
        decode_stays_within_a_row,
        prefill_stays_before_the_diagonal,
        streaming_leaves_the_middle_out,
    ],
)
def test_tiles_that_no_query_sees_are_not_loaded(cpu, check):
    """There are NaNs in them, and 0 times NaN is NaN."""
    assert cpu.call(complaint, check.__name__) is None


@needs_mosaic
def test_race_detection_is_on():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PJRT_NPROC", str(2 * compat.INTERPRETER_THREADS))
        with Compiler() as process:  # of its own: what the interpreter knows is broken afterwards
            assert process.call(complaint, "a_race_is_an_error") is None


@needs_mosaic
def test_the_interpreter_refuses_to_wait_forever(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert "start the process with PJRT_NPROC=4" in refusal("interpret_mosaic")
    monkeypatch.setenv("PJRT_NPROC", "4")
    assert compat.no_mosaic_interpreter() is None


@needs_mosaic
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_gradients_are_refused_by_name(op):
    case = next(case for name, case in named().items() if name.startswith(op) and case.gradient)
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    assert "no gradients; implementation='triton' and" in refusal("mosaic", H200, case)


@needs_mosaic
@pytest.mark.parametrize("op", ["full", "streaming"])
def test_auto_takes_gradients_from_xla_where_there_is_no_triton(monkeypatch, op):
    monkeypatch.setattr(compat, "no_triton", lambda: "is blocked")
    case = next(case for name, case in named().items() if name.startswith(op) and case.gradient)
    case = dataclasses.replace(case, dtype="bfloat16", head_dim=64)
    with described(H200):
        run = functools.partial(case.run, implementation="auto")
        text = str(jax.make_jaxpr(run)(*case.shapes()))
    assert f"duo_{op}_mosaic" in text
    assert f"duo_{op}_d" not in text


def test_a_kernel_has_the_gradient_of_its_reference():
    attend = gradient.by(lambda x, y: x * x * y, lambda x, y: 10 * x * y)
    value, (d_x, d_y) = jax.value_and_grad(attend, argnums=(0, 1))(jnp.float32(3), jnp.float32(2))
    assert (value, d_x, d_y) == (60, 12, 9)


REFUSED = {
    "float32": (DecodeCase(lengths=(3,), slots=8, dtype="float32", **HEADS), "bfloat16 and float1"),
    "head_dim 80": (
        DecodeCase(lengths=(3,), slots=8, q_heads=4, kv_heads=2, head_dim=80), "80, Mosaic .* 64"
    ),
    "int2": (DecodeCase(lengths=(3,), slots=64, bits=2, **WIDE), "do not read 2 bits"),
    "int4 of head_dim 64": (
        DecodeCase(lengths=(3,), slots=64, bits=4, **HEADS), "read 4 bits of head_dim 64"
    ),
    "prefill of int2": (
        PrefillCase(starts=(0,), length=3, slots=64, bits=2, **WIDE), "do not read 2 bits"
    ),
    "many queries of a head": (
        DecodeCase(lengths=(3,), slots=8, q_heads=65, kv_heads=1, head_dim=64), "65 query heads"
    ),
}  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_mosaic_kernel_takes_is_refused_with_the_reason(case, reason):
    assert re.search(f"implementation='mosaic': .*{reason}", refusal("mosaic", H200, case))


@needs_mosaic
def test_merging_parts_has_no_mosaic_kernel():
    case = next(case for name, case in named().items() if name.startswith("merge"))
    assert "merge_lse has no Mosaic kernel" in refusal("mosaic", H200, case)


def described(gpu: str):
    """Trace for a GPU that is only described."""
    device = AbstractDevice(device_kind=gpu, num_cores=108, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def refusal(implementation: str, gpu: str | None = None, case: Case | None = None) -> str:
    """Return why an implementation cannot run a case, for a described GPU or for the CPU."""
    case = case or CASES["decode: one token"]
    run = functools.partial(case.run, implementation=implementation)
    with (
        described(gpu) if gpu else contextlib.nullcontext(),
        pytest.raises(NotImplementedError) as raised,
    ):
        jax.eval_shape(run, *case.shapes())
    return str(raised.value)


@pytest.mark.skipif(compat.no_mosaic() is None, reason="this jax has Mosaic's interpreter")
@pytest.mark.parametrize("implementation", ["mosaic", "interpret_mosaic"])
def test_an_older_jax_refuses_mosaic_with_the_reason(implementation):
    said = refusal(implementation, H200)
    assert said == f"implementation='{implementation}' {compat.no_mosaic()}"
    assert "jax 0.12 or newer" in said
    assert jax.__version__ in said


@needs_mosaic
def test_mosaic_needs_a_hopper():
    assert refusal("mosaic").endswith(
        "needs a Hopper GPU (H100, H200), and this process runs on cpu"
    )
    assert refusal("mosaic", A100).endswith("not NVIDIA A100-SXM4-80GB")


@needs_mosaic
@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("gpu", [H200, A100])
def test_auto_takes_mosaic_on_a_hopper_without_triton_only(monkeypatch, gpu, has_triton):
    if not has_triton:
        monkeypatch.setattr(compat, "no_triton", lambda: "is blocked")
    case = CASES["decode: one token"]
    with described(gpu):
        text = str(
            jax.make_jaxpr(functools.partial(case.run, implementation="auto"))(*case.shapes())
        )
    assert ("duo_decode_mosaic" in text) == (not has_triton and gpu == H200)
    assert ("duo_decode" in text) == (has_triton or gpu == H200)


@needs_mosaic
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in CASES])
def test_every_case_is_traced_by_name_for_a_hopper(name):
    """Under the type checker, which the other process does without."""
    case = CASES[name]
    with described(H200):
        run = functools.partial(case.run, implementation="mosaic")
        assert "_mosaic" in str(jax.make_jaxpr(run)(*case.shapes()))


@needs_mosaic
def test_tiles_of_no_warpgroup_are_a_mistake():
    case = PrefillCase(starts=(0,), length=8, slots=8, **HEADS)
    run = functools.partial(case.run, implementation="mosaic", tiles=two_stages(32))
    with described(H200), pytest.raises(ValueError, match="have not 64 or, unpacked, 128 queries"):
        jax.eval_shape(run, *case.shapes())


@needs_mosaic
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("prefill", "float16"),
        ("decode", "ragged rows"),
        pytest.param("streaming", "float16", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_an_h200_without_spilling(compiler, tmp_path, op, name):
    row = compiler.call(mosaic.compile_case, op, name, str(tmp_path))
    assert row["error"] is None
    (kernel,) = row["kernels"]
    assert kernel["spill_stores"] == kernel["spill_loads"] == 0
    assert kernel["tma"]["loads"] >= 5
    assert kernel["tma"]["stores"] >= 1
    assert all(x.startswith("wgmma") for x in kernel["matrix_instructions"])
    assert kernel["matrix_instructions"]


def test_document_is_what_the_generator_makes():
    result = json.loads((ROOT / compiled_mosaic.RESULT).read_text(encoding="utf-8"))
    assert (ROOT / compiled_mosaic.DOCUMENT).read_text(encoding="utf-8") == mosaic.to_markdown(
        result
    )
    assert [(row["op"], row["case"]) for row in result["rows"]] == mosaic.cases()
    for kernel in (kernel for row in result["rows"] for kernel in row["kernels"]):
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
