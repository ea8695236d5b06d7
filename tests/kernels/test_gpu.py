"""Every case on a GPU, by the checks that benchmarks.gpu_report runs; where there is none, skipped.

JAX_PLATFORMS=cuda python -m pytest -n 0 -m gpu tests/kernels/test_gpu.py

Where the type checker or pytest-xdist are missing, after `pytest`: -o addopts= -m gpu
"""

import time

import jax
import pytest

from benchmarks.gpu import checks, mosaic
from kernels.all_cases import CASES, named

NAMED, BY_MOSAIC = named(), mosaic.served(CASES)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax has no GPU here")
@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED.keys())
def test_kernel_errs_at_most_twice_as_much_as_xla_and_writes_all_outputs(case):
    result = checks.check(case, seed=time.time_ns() % 2**31)
    assert result["passed"], result


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.unavailable("mosaic") is not None, reason="no Mosaic kernel runs here")
@pytest.mark.parametrize("case", BY_MOSAIC.values(), ids=BY_MOSAIC.keys())
def test_mosaic_kernel_errs_at_most_twice_as_much_as_xla(case):
    result = checks.check(case, seed=time.time_ns() % 2**31, implementation="mosaic")
    assert result["passed"], result
