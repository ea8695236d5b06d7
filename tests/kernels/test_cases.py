"""The ladder: XLA against float64 numpy, then the kernel in Pallas' interpreter against XLA.

In every slot that no query sees, there are stale numbers. Compiling for GPUs (test_compiled.py) and
running on one (test_gpu.py) are the next rungs.

By default the largest cases run that show, of every op and its gradient, each 16-bit dtype, and of
decoding and the streaming mask each width of a tile, and whether some of its columns are masked:
kernels and the choice of tiles tell nothing else apart but lengths and groups, and those of AWKWARD
show all of these in float32.
Every packed shape runs in one format, decoding and prefill in turn. Of awkward lengths those are
slow that another case stands for. The slow tests run all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.all_cases import AWKWARD, CASES, named
from kernels.prefill.cases import PrefillCase
from kernels.tile_io import width

SMALL = {name: case for name, case in named().items() if not case.compile_only}
LENGTHS = named(AWKWARD)
# Other cases stand for these: one token for three, one past the end of a window for one before it,
# those in half precision for a head_dim and for gradients of odd length, a group of 7 for one of 1
# and for odd numbers, and rows of a full cache for those of other fillings.
SAID_ALREADY = ("three tokens", "one short", "one token less", "past two blocks", "29 tokens")
SAID_ALREADY += ("head_dim 80", "head_dim 96", "gradient, one past", "gradient, odd", "group of 1")
SAID_ALREADY += ("empty rows, group of 7", "half full", "blocks of an empty cache", "sinks only")


def is_said_already(name: str) -> bool:
    """Say whether another case stands for one of awkward length: a chunk for a whole sequence."""
    chunk = name.replace("streaming: ", "streaming: chunk, ")
    return any(x in name for x in SAID_ALREADY) or (chunk != name and chunk in LENGTHS)


def representatives() -> set[str]:
    """Return the names of the cases that run by default."""
    packed = {name: case for name, case in SMALL.items() if case.bits is not None}
    shapes = sorted({(case.dtype, case.head_dim) for case in packed.values()})
    chosen = {name for name in SMALL if name.startswith("merge")}
    for name, case in packed.items():
        index = shapes.index((case.dtype, case.head_dim))
        in_turn = name.startswith(("decode", "prefill")[index % 2])
        chosen |= {name} if in_turn and case.bits == (2, 4, 8)[index % 3] else set()
    shown = set()
    for name, case in sorted(SMALL.items(), key=lambda item: -item[1].cost().flops):
        if name not in packed and case.dtype != "float32":
            columns = width(case.head_dim)
            facts = (case.dtype, columns, f"masked: {columns != case.head_dim}")
            op = name.partition(":")[0]
            facts = facts if op in ("decode", "streaming") and not case.gradient else facts[:1]
            new = {(op, case.gradient, fact) for fact in facts} - shown
            shown |= new
            chosen |= {name} if new else set()
    return chosen


DEFAULT = representatives()
LAST = {next(x for x in reversed(SMALL) if x.startswith(f"{op}:") and x in DEFAULT) for op in CASES}


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Return how the test of a case is marked."""
    return [pytest.mark.core] * (name in LAST) + [pytest.mark.slow] * (name not in DEFAULT)


# Results are of size 1. XLA adds in another order, and may be luckier.
FLOOR = 2e-6


def run(case, arguments, implementation):
    return jax.jit(functools.partial(case.run, implementation=implementation))(*arguments)


def error(got, want) -> float:
    got = np.asarray(got, np.float64)
    return np.abs(np.subtract(got, want, out=np.zeros_like(got), where=got != want)).max()  # -inf


def check_types(case, results, wanted):
    """Outputs and gradients have the case's dtype, the lse is float32; shapes are as wanted."""
    dtypes = [jnp.dtype(case.dtype)] * len(results)
    if not case.gradient and len(results) == 2:
        dtypes[1] = jnp.dtype(jnp.float32)
    assert [x.dtype for x in results] == dtypes
    assert [x.shape for x in results] == [x.shape for x in wanted]


def rounds_keys(case) -> bool:
    """Whether its kernel rounds keys, or queries that hold their scales, to the case's dtype."""
    return case.bits == 2 or (case.bits is not None and isinstance(case, PrefillCase))


def check_lse(got, wanted):
    # Products of two half-precision numbers are exact in float32.
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=2e-6)


def check_xla(case, arguments, results, wanted):
    """XLA is as close to float64 as its dtype allows."""
    check_types(case, results, wanted)
    if case.dtype == "float32":
        tolerance = {"atol": 2e-5 if case.gradient else 2e-6, "rtol": 2e-5}
        for got, want in zip(results, wanted, strict=True):
            np.testing.assert_allclose(got, want, **tolerance)
    elif not case.gradient:
        rounded = case.expected(arguments, rounded_to=case.dtype)
        for got, other, want in zip(results, rounded, wanted, strict=True):
            assert error(got, want) <= 2 * error(other, want) + FLOOR


def check_kernel(case, results, xla, wanted):
    """The kernel errs at most twice as much as XLA."""
    check_types(case, results, wanted)
    # The backward pass takes sum(p * d_p) from the output that the forward pass rounded, as in
    # FlashAttention-2, XLA from its own float32; over three tokens nothing averages that out. In
    # 2 bits the queries are multiplied with the scales of channels, and rounded again; in the lse
    # of a few queries nothing averages that out either.
    times = 4.0 if case.gradient and case.length < 16 else 2.0
    for index, (got, other, want) in enumerate(zip(results, xla, wanted, strict=True)):
        if index == 1 and not case.gradient and not rounds_keys(case):
            check_lse(got, want)
        else:
            allowed = 4.0 if index == 1 and rounds_keys(case) else times
            assert error(got, want) <= allowed * error(other, want) + FLOOR


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=marks(name)) for name, case in SMALL.items()]
)
def test_xla_matches_float64_and_the_kernel_matches_xla(case):
    arguments = case.draw()
    wanted = case.expected(arguments)
    xla = run(case, arguments, "xla")
    check_xla(case, arguments, xla, wanted)
    check_kernel(case, run(case, arguments, "interpret"), xla, wanted)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * is_said_already(name))
        for name, case in LENGTHS.items()
    ],
)
def test_both_match_float64_where_blocks_and_windows_meet(case):
    arguments = case.draw()
    wanted = case.expected(arguments)
    check_xla(case, arguments, run(case, arguments, "xla"), wanted)
    kernel = run(case, arguments, "interpret")
    check_types(case, kernel, wanted)
    for got, want in zip(kernel, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
