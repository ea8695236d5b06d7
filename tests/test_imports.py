"""Imports point one way: from what a user types down to the kernels, never up or in a circle."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A room imports only from rooms in the rows above its own; "duo_jax" is the package itself.
ROWS = """
errors
process
files
schema
kernels
model data
mesh
heads reports
cache checkpoints
serve
session
api
engine
duo_jax
cli
generate plan evaluate train convert server __main__
benchmarks
"""
LEVEL = {room: level for level, row in enumerate(ROWS.split("\n")) for room in row.split()}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("duo_jax", "kernels", "train", "convert", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
}


def room(module: str) -> str:
    """Return "heads" for duo_jax.heads.split, "kernels" for kernels.decode.api."""
    return module.removeprefix("duo_jax.").split(".")[0]


def imports(module: str) -> set[str]:
    """Return the modules of this repository that a module imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                names.add(child if child in FILES else node.module)
    return names & FILES.keys()


GRAPH = {module: imports(module) for module in FILES}


def test_no_room_imports_from_above():
    assert [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if room(module) != room(name) and LEVEL[room(module)] <= LEVEL[room(name)]
    ] == []


def test_no_modules_import_each_other_in_a_circle():
    left = dict(GRAPH)
    while done := [module for module, names in left.items() if not names & left.keys()]:
        left = {module: names for module, names in left.items() if module not in done}
    assert left == {}


def test_duo_jax_has_few_files_outside_its_rooms():
    assert len(list((ROOT / "duo_jax").glob("*.py"))) <= 6


LATE = """
import pathlib, sys
import duo_jax.server.serving
from duo_jax.checkpoints.tokenizer_files import load_tokenizer
print("transformers" in sys.modules)
load_tokenizer(pathlib.Path("duo_jax/demo"))
print("transformers" in sys.modules, "torch" in sys.modules)
"""


@pytest.mark.slow
def test_transformers_is_imported_by_our_loaders_and_without_torch():
    """They keep its advice quiet; torch takes seconds more, where it is installed."""
    command = [sys.executable, "-c", LATE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
