"""The report's checks can fail, and other libraries and tile sizes do the same work."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.gpu import arrays, checks, rivals
from benchmarks.gpu.settings import real
from kernels.all_cases import served_by_mosaic
from kernels.decode.cases import DecodeCase
from kernels.equivalent import UnsuitableError
from kernels.full.cases import FullCase
from kernels.gpu import H200
from kernels.prefill import cases as prefill_cases
from kernels.prefill.cases import PrefillCase
from kernels.streaming.cases import StreamingCase

SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 16}
DECODE = DecodeCase(lengths=(33, 0), slots=40, dtype="float32", **SMALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(DecodeCase):
    """A kernel with a fault; its XLA version is sound."""

    fault: str

    def run(self, *arguments, implementation, tiles=None):
        out, lse = super().run(*arguments, implementation="xla", tiles=tiles)
        if implementation == "xla":
            return out, lse
        if self.fault == "wrong":
            out = out * 1.0001
        elif self.fault == "unwritten":
            out = write_half(out)
        elif self.fault == "empty row":
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        elif self.fault == "race":
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            out = out + jax.pure_callback(lambda: np.float32(next(NOISE)), shape) * 1e-7
        return out, lse


NOISE = iter(range(100))


def write_half(x):
    """Copy x by a kernel that forgets half of the rows."""

    def kernel(x_ref, out_ref):
        out_ref[0] = x_ref[0]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(
        x
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("none", None),
        ("wrong", "output 0: error 1.00e-04, XLA's 0.00e+00 (all)"),
        ("unwritten", "output 0: error nan"),
        ("empty row", "output 1: error inf"),
        ("race", "output 0 depends on what its memory held before, or on chance"),
    ],
)
def test_checks_find_faults(fault, problem):
    case = Broken(**dataclasses.asdict(DECODE), fault=fault)
    result = checks.check(case, seed=3, implementation="interpret")
    assert result["passed"] == (problem is None), result
    assert problem is None or result["problems"][0].startswith(problem)
    assert result["outputs"] == 2


def test_memory_is_poisoned_with_two_numbers_before_the_kernel_runs(monkeypatch):
    fills, scribbles = [], []
    fill, scribble = arrays.filled_like, arrays.scribble
    monkeypatch.setattr(
        arrays, "filled_like", lambda x, value: fills.append(value) or fill(x, value)
    )
    monkeypatch.setattr(
        arrays, "scribble", lambda n, value: scribbles.append(value) or scribble(n, value)
    )
    result = checks.check(DECODE, seed=3, implementation="interpret")
    assert result["outputs_in_poisoned_buffers"] == 2
    assert math.isnan(fills[0])
    assert fills[1] > 1e4
    np.testing.assert_array_equal(scribbles, fills)


@pytest.mark.slow
def test_packed_caches_are_checked_as_they_are():
    case = DecodeCase(bits=2, lengths=(70, 0), slots=128, dtype="float32", **SMALL)
    result = checks.check(case, seed=3, implementation="interpret")
    assert result["passed"], result
    assert case.candidates(gpu=H200)[0] == case.tiles(gpu=H200)
    assert {x.block_kv for x in case.candidates(gpu=H200)} == {16, 32}
    with pytest.raises(UnsuitableError, match="packed"):
        case.equivalent(arrays.draw(case, 0))


def test_an_output_outside_its_poisoned_buffer_fails():
    programs = checks.compiled(DECODE, "interpret")
    shapes = DECODE.shapes()

    def kernel(_, *arguments):
        return DECODE.run(*arguments, implementation="interpret")

    keeping = jax.jit(kernel, keep_unused=True).lower(programs.outputs, *shapes).compile()
    assert checks.run(DECODE, programs, seed=3)["passed"]
    result = checks.run(DECODE, dataclasses.replace(programs, kernel=keeping), seed=3)
    assert not result["passed"]
    assert result["outputs_in_poisoned_buffers"] == 0
    assert result["problems"] == [
        f"output {i} did not take the place of its poisoned buffer" for i in range(2)
    ]


def test_drawn_numbers_are_fresh_and_integers_are_the_cases_own():
    first, second = arrays.draw(DECODE, 1), arrays.draw(DECODE, 2)
    assert not jnp.array_equal(first[0], second[0])
    assert not jnp.array_equal(first[1], first[2])
    np.testing.assert_array_equal(first[3], [33, 0])


@pytest.mark.slow
def test_pieces_of_a_long_prefill_are_parts_of_the_whole(monkeypatch):
    monkeypatch.setattr(prefill_cases, "_MOST_PAIRS", 1)
    monkeypatch.setattr(prefill_cases, "_PIECE", 8)
    case = PrefillCase(starts=(5,), length=40, slots=50, dtype="float32", **SMALL)
    arguments = arrays.draw(case, 0)
    whole = case.run(*arguments, implementation="xla")
    pieces = case.pieces()
    assert [piece.first for piece in pieces] == [0, 17, 32]
    for piece in pieces:
        part = piece.case.run(*piece.arguments(*arguments), implementation="xla")
        for one, all_of_it in zip(part, whole, strict=True):
            np.testing.assert_allclose(one, all_of_it[piece.rows], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        DecodeCase(lengths=(33,), slots=40, dtype="float32", **SMALL),
        FullCase(length=20, batch=2, dtype="float32", **SMALL),
        PrefillCase(starts=(0,), length=20, slots=30, dtype="float32", **SMALL),
        StreamingCase(length=20, sink_size=0, recent_size=7, dtype="float32", **SMALL),
    ],
    ids=["decode", "full", "prefill", "streaming without sinks"],
)
def test_other_libraries_are_given_the_same_work(case):
    arguments = arrays.draw(case, 0)
    (call,) = case.equivalent(arguments).calls
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=case.softmax_scale,
        implementation="xla",
        **rivals.masking(call),
    )
    with jax.numpy_rank_promotion("allow"):
        theirs = attend(call.q, call.k, call.v)
    ours = case.run(*arguments, implementation="xla")[0]
    np.testing.assert_allclose(theirs.reshape(ours.shape), ours, atol=1e-5)


def test_a_chunk_behind_a_past_is_two_calls_of_theirs():
    case = PrefillCase(starts=(30,), length=10, slots=64, **SMALL)
    work = case.equivalent(arrays.draw(case, 0))
    assert [(call.k.shape[1], call.causal) for call in work.calls] == [(10, True), (30, False)]
    assert "not merged" in work.note
    with pytest.raises(UnsuitableError, match="different lengths"):
        DECODE.equivalent(arrays.draw(DECODE, 0))


@pytest.mark.parametrize("op", ["decode", "full", "merge", "prefill", "streaming"])
def test_tile_sizes_to_try_begin_with_the_ops_own_and_differ(op):
    for case in real().timed[op].values():
        found = case.candidates(gpu=H200)
        assert found[0] == case.tiles(gpu=H200)
        assert len(set(found)) == len(found) >= 6
        found = case.candidates(gpu=H200, mosaic=True)
        assert len(set(found)) == len(found) >= 3 * served_by_mosaic(case)
