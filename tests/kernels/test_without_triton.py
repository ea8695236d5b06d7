"""A later jax will drop Pallas' Triton lowering: everything but its kernels works without it."""

import pathlib
import subprocess
import sys
import tomllib

import jax

from kernels import compat

ROOT = pathlib.Path(__file__).parents[2]


def test_jax_without_triton_serves_auto_and_refuses_kernels_with_the_reason():
    """By the switch that runs any of the tests so."""
    words = ["-p", "tests.without_triton", "-o", "addopts=", "-q", "-rfs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "tests/without_triton/what_is_left.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    said = done.stdout
    assert "1 failed, 2 passed, 4 skipped" in said, said + done.stderr
    assert "FAILED tests/without_triton/what_is_left.py::test_another_failure_is_one" in said
    (refusal,) = (line for line in said.splitlines() if line.startswith("SKIPPED"))
    assert refusal.startswith("SKIPPED [4] ")
    assert f"needs Pallas' Triton lowering, which jax {jax.__version__} does not have" in refusal


def test_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compat, "_triton", lambda: None)
    assert f"pip install '{compat.TESTED}'" in compat.no_triton()


def test_the_versions_that_the_message_names_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert compat.TESTED in project["dependencies"]
