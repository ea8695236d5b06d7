"""Every named case, run by Pallas' interpreter, against float64 numpy and against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.all_cases import CASES
from tests.kernels import oracle

INTERPRETED = {
    f"{op}, {name}": case
    for op, cases in CASES.items()
    for name, case in cases.items()
    if not case.compile_only
}
every_case = pytest.mark.parametrize("case", INTERPRETED.values(), ids=INTERPRETED.keys())

# Where the kernel's own number type is not the point, but its loops are.
AWKWARD = [
    "decode, one token", "decode, empty rows", "decode, group of 7, odd length",
    "decode, group of 1, head_dim 80",
    "full, group of 7, odd length", "full, group of 1, head_dim 80",
    "merge, empty parts and rows", "merge, odd number of rows, head_dim 80",
    "prefill, three tokens, ragged", "prefill, group of 7, odd length", "prefill, head_dim 96",
    "streaming, one token before the sinks' end", "streaming, sink + recent + 1",
    "streaming, odd length, rows of many pasts", "streaming, a chunk shorter than the window",
    "streaming, gradient, three tokens", "streaming, gradient, no sinks",
]  # fmt: skip

# Of results of size 1. XLA adds in another order, and may be luckier.
FLOOR = 2e-6


def run(case, arguments, implementation):
    return jax.jit(functools.partial(case.run, implementation=implementation))(*arguments)


def allowed(case) -> float:
    """Return how many times XLA's error the kernel's may be."""
    # The backward pass takes sum(p * d_p) from the output that the forward pass rounded, as in
    # FlashAttention-2, XLA from its own float32; over three tokens nothing averages that out.
    return 4.0 if getattr(case, "gradient", False) and case.length < 16 else 2.0


def error(got, want) -> float:
    got = np.asarray(got, np.float64)
    return np.abs(np.subtract(got, want, out=np.zeros_like(got), where=got != want)).max()  # -inf


def dtypes(results) -> list[str]:
    return [str(x.dtype) for x in results]


@every_case
def test_the_kernel_errs_at_most_twice_as_much_as_xla(case):
    """Gradients too; in every slot that nobody sees, there are stale numbers."""
    arguments = oracle.draw(case)
    want = oracle.expected(case, arguments)
    kernel, xla = (run(case, arguments, name) for name in ("interpret", "xla"))
    assert dtypes(kernel) == dtypes(xla)
    for index, (got, other, wanted) in enumerate(zip(kernel, xla, want, strict=True)):
        assert got.shape == other.shape == wanted.shape
        # In 2 bits the queries are multiplied with the scales of channels, and rounded again.
        rounded = getattr(case, "gradient", False) or getattr(case, "bits", None) == 2
        if index == 1 and not rounded:  # lse
            # Products of two half-precision numbers are exact in float32.
            np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=2e-6)
        else:
            # In 2 bits the lse of a few queries is rounded, and nothing averages that out.
            times = 4.0 if index == 1 and getattr(case, "bits", None) == 2 else allowed(case)
            assert error(got, wanted) <= times * error(other, wanted) + FLOOR


@pytest.mark.parametrize("name", AWKWARD)
def test_the_kernel_in_float32_matches_float64(name):
    case = INTERPRETED[name]
    arguments = oracle.cast(oracle.draw(case), jnp.float32)
    want = oracle.expected(case, arguments)
    results = run(case, arguments, "interpret")
    assert set(dtypes(results)) == {"float32"}
    for got, wanted in zip(results, want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=2e-5)
