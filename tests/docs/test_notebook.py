"""The notebook prints what is stored in it."""

import nbformat
import pytest

from docs import notebook

MAX_BYTES = 50_000


def outputs(node: nbformat.NotebookNode) -> list[list[str]]:
    """Return what each cell prints or shows; of a picture, that it is one."""
    cells = (cell for cell in node.cells if cell.cell_type == "code")
    return [[part.get("text") or part.output_type for part in cell.outputs] for cell in cells]


@pytest.fixture
def kernel_environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(notebook.NOTEBOOK.parents[1]))


@pytest.mark.slow  # tests/docs/test_examples.py runs its cells, tests/test_readme.py its prompt
@pytest.mark.usefixtures("kernel_environment")
def test_it_prints_what_is_stored_in_it():
    stored = nbformat.read(notebook.NOTEBOOK, as_version=4)
    assert ["display_data"] in outputs(stored)
    assert outputs(notebook.executed(notebook.NOTEBOOK)) == outputs(stored)


def test_its_stored_outputs_are_small():
    assert notebook.NOTEBOOK.stat().st_size < MAX_BYTES
