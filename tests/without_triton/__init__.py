"""Run tests as on a later jax that has dropped Pallas' Triton lowering.

    python -m pytest -p tests.without_triton -m core

Importing the lowering fails, in the processes that tests start too. What is left is XLA on the CPU
and, with jax 0.12, the Mosaic kernels. A test that asks for a Triton kernel by name is refused, and
skipped with the refusal as the reason; whatever else fails without Triton fails here.
"""

import importlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

_PATH = str(pathlib.Path(__file__).parent / "path")
_REFUSED = re.compile(r"'(triton|interpret)' (needs Pallas' Triton lowering, .* does not have)")
# What "auto" does where there are Triton kernels, on GPUs that are only described.
_NEED_TRITON = {
    "test_kernels_can_be_lowered_for_a_gpu_and_auto_picks_them",
    "test_auto_refuses_arrays_that_a_kernel_cannot_address_where_there_are_kernels",
}

# For processes that are started from here; this one has read its sitecustomize, if there is one.
os.environ["PYTHONPATH"] = os.pathsep.join([_PATH, *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, _PATH)
importlib.reload(importlib.import_module("sitecustomize"))


def pytest_report_header() -> str:
    return "jax.experimental.pallas.triton is blocked"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.partition("[")[0] in _NEED_TRITON:
            item.add_marker(pytest.mark.skip(reason="needs Pallas' Triton lowering"))


def _skip_what_is_refused(item: pytest.Item) -> Iterator[None]:
    del item
    try:
        return (yield)
    except Exception as error:
        refused = _REFUSED.search(str(error))
        if refused is not None:
            pytest.skip(refused[2])
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skip_what_is_refused)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skip_what_is_refused)
