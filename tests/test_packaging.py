"""The package: declared imports, types, one version, commands under one name."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from duo_jax import __main__ as command

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
OURS = {*PACKAGES, "benchmarks", "tests", "docs"}
# Imported in environments of their own (benchmarks/serving/rivals.py, benchmarks/real_speed.py).
ELSEWHERE = {"kvpress", "llama_cpp"}
# Where an extra may be imported at the top of a file: nobody imports these without it.
NEED_AN_EXTRA = (
    "duo_jax/evaluate/harness",
    "duo_jax/evaluate/lm_eval_model.py",
    "duo_jax/server",
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


REQUIRED = distributions(PROJECT["project"]["dependencies"])
OPTIONAL = {
    name
    for requirements in PROJECT["project"]["optional-dependencies"].values()
    for name in distributions(requirements)
}


@functools.cache
def import_statements(folder: str) -> list[tuple[bool, ast.Import | ast.ImportFrom, str]]:
    """Return whether each is at a file's top level, the statement, and the file."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_top = set(tree.body)
        found += [
            (node in at_top, node, str(file.relative_to(ROOT)))
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
    return found


def imports(folders: list[str] | set[str], *, top_level: bool) -> Iterator[tuple[str, str]]:
    """Yield the packages of others that files import (at their top level only), and the file."""
    for folder in sorted(folders):
        for at_top, node, file in import_statements(folder):
            if at_top or not top_level:
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                for name in {name.split(".")[0] for name in names}:
                    if name not in sys.stdlib_module_names and name not in OURS | ELSEWHERE:
                        yield name, file


_installed = functools.cache(importlib.metadata.packages_distributions)  # takes a second


def provided_by(name: str) -> set[str]:
    """Return the distributions that an import may come from; its own name, if none is installed."""
    return {canonical(distribution) for distribution in _installed().get(name, [name])}


def test_every_import_is_declared():
    missing = {
        f"{name} in {file}"
        for name, file in imports(OURS, top_level=False)
        if not provided_by(name) & (REQUIRED | OPTIONAL)
    }
    assert not missing


def test_no_module_needs_an_extra_to_be_imported():
    missing = {
        f"{name} in {file}"
        for name, file in imports(PACKAGES, top_level=True)
        if not provided_by(name) & REQUIRED and not file.startswith(NEED_AN_EXTRA)
    }
    assert not missing


def test_every_dependency_is_imported():
    used = {name for imported, _ in imports(PACKAGES, top_level=False)
            for name in provided_by(imported)}  # fmt: skip
    assert not REQUIRED - used


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_there_is_one_version():
    version = PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d[\w.]*)", changelog, re.MULTILINE)[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# One name for every command.


def test_duo_jax_lists_its_commands(capsys):
    command.main([])
    listed = capsys.readouterr().out
    assert listed.startswith("usage: duo-jax COMMAND")
    assert re.findall(r"^  (\S+)  ", listed, re.MULTILINE) == list(command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_command_is_the_module_that_it_names(name, monkeypatch):
    module, _ = command.COMMANDS[name]
    given = []
    monkeypatch.setattr(f"{module}.main", given.append)
    command.main([name, "--seed", "1"])
    assert given == [["--seed", "1"]]


def test_a_command_that_does_not_exist_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["gnerate"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_console_script_is_declared():
    assert PROJECT["project"]["scripts"] == {"duo-jax": "duo_jax.__main__:main"}


def test_the_list_appears_without_jax():
    code = "import sys; from duo_jax.__main__ import main; main([]); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")
