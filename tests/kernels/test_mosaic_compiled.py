"""The Mosaic kernels compiled for an H200, and the document that describes them."""

import json
import pathlib

import pytest

from benchmarks import compiled_mosaic
from benchmarks.compile import mosaic
from tests.kernels.mosaic_cases import needs_mosaic

pytestmark = pytest.mark.core

ROOT = pathlib.Path(__file__).parents[2]


@needs_mosaic
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("prefill", "float16"),
        ("decode", "ragged rows"),
        pytest.param("streaming", "float16", marks=pytest.mark.slow),
        pytest.param("decode_packed", "int2, ragged rows", marks=pytest.mark.slow),
        pytest.param("decode_packed", "int4, empty rows", marks=pytest.mark.slow),
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
    same = {row["op"]: row["case"] for row in result["rows"] if row["same_for_h100"]}
    assert same == mosaic.compared()
    for kernel in (kernel for row in result["rows"] for kernel in row["kernels"]):
        assert kernel["spill_stores"] == kernel["spill_loads"] == 0
