"""Run examples/quickstart.ipynb and store its outputs: `python -m docs.notebook`."""

import pathlib

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples/quickstart.ipynb"


def executed(file: pathlib.Path) -> nbformat.NotebookNode:
    """Run a notebook; return it with the new outputs.

    Warnings and log lines are dropped, and so is what differs from run to run: times, counters and
    where a cell's text was cut into pieces.
    """
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(file.parent))
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            text = "".join(part.text for part in cell.outputs if part.get("name") == "stdout")
            printed = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
            shown = [part for part in cell.outputs if part.output_type == "display_data"]
            cell.outputs = printed + shown
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
