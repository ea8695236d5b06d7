"""The Mosaic kernels run on a CPU, against float64, with race detection.

They run in a process of their own, which has a thread for every warpgroup. By default the smaller
cases of every op; the slow tests run all.
"""

import functools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import compat
from kernels.aot_process import Compiler
from kernels.decode.cases import DecodeCase
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase
from kernels.tiles import DecodeTiles, ForwardBackwardTiles
from tests.kernels.mosaic_cases import (
    CASES,
    HEADS,
    ONE_HEAD,
    marks,
    needs_mosaic,
    refusal,
    two_stages,
)

pytestmark = pytest.mark.core


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
@pytest.mark.one_in(3)
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
