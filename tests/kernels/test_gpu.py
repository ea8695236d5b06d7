"""Every case on a GPU, by the checks that benchmarks.gpu_report runs; where there is none, skipped.

JAX_PLATFORMS=cuda python -m pytest -n 0 -m gpu tests/kernels/test_gpu.py

Where the type checker or pytest-xdist are missing, after `pytest`: -o addopts= -m gpu
"""

import time

import jax
import pytest

from benchmarks.gpu import checks
from kernels.all_cases import named

NAMED = named()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax has no GPU here")
@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED.keys())
def test_kernel_errs_at_most_twice_as_much_as_xla_and_writes_all_outputs(case):
    result = checks.check(case, seed=time.time_ns() % 2**31)
    assert result["passed"], result
