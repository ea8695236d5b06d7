"""Other packages with the names of ours: said in one line, before anything fails deep inside."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from duo_jax import errors

ROOT = pathlib.Path(__file__).parents[2]
# The files of Hugging Face's package `kernels` that have the same paths as ours.
THEIRS = {"kernels/__init__.py": "__all__ = []\n", "kernels/compat.py": "has_torch = False\n"}


def importing(*paths: pathlib.Path, cwd: pathlib.Path) -> str:
    """Import duo_jax.load in a process of its own; return the last line that it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", "import duo_jax; duo_jax.load"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.strip().splitlines()
    assert (done.returncode == 0) == (not any(line.startswith("Import") for line in lines))
    return lines[-1] if done.returncode else ""


@pytest.fixture
def site(tmp_path) -> pathlib.Path:
    """A folder as an installation leaves it, with just the files that are looked at."""
    site = tmp_path / "site-packages"
    for file in ("duo_jax/__init__.py", "duo_jax/errors.py", *marked_files()):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, site / file)
    # Nothing else of duo_jax is there: where no error is raised before, this one is.
    (site / "duo_jax" / "api.py").write_text("raise ImportError('nothing was refused')")
    return site


def marked_files() -> list[str]:
    return [f"{name}/{file}" for name, files in errors._MARKED.items() for file in files]


def test_our_own_packages_are_accepted(site, tmp_path):
    errors.check_packages()
    assert importing(site, cwd=tmp_path) == "ImportError: nothing was refused"


OVERWRITTEN, REMOVED = "x = 1\n", None


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("content", "file"),
    [  # by default each file in one of the ways
        pytest.param(
            content,
            file,
            id=f"{'removed' if content is REMOVED else 'overwritten'}-{file}",
            marks=[pytest.mark.slow] * ((number % 2 == 0) == (content is REMOVED)),
        )
        for number, file in enumerate(marked_files())
        for content in (OVERWRITTEN, REMOVED)
    ],
)
def test_a_file_that_another_package_overwrote_or_took_along(site, tmp_path, file, content):
    (site / file).unlink()
    if content is not None:
        (site / file).write_text(content)
    name = file.split("/")[0]
    line = importing(site, cwd=tmp_path)
    assert line.startswith(f"ImportError: another package named '{name}' (")
    assert str(site / name) in line
    assert line.endswith("environment of its own (python -m venv), or remove that package and "
                         "reinstall duo_jax")  # fmt: skip


def test_a_package_that_is_found_before_ours(tmp_path):
    for file, content in THEIRS.items():
        (tmp_path / "first" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first" / file).write_text(content)
    line = importing(tmp_path / "first", ROOT, cwd=tmp_path)
    assert f"another package named 'kernels' (not installed by pip) is at {tmp_path}/first" in line


def test_a_module_in_the_place_of_our_package(site, tmp_path):
    (tmp_path / "kernels.py").write_text("x = 1\n")
    assert f"is at {tmp_path}/kernels.py, where" in importing(site, cwd=tmp_path)


def test_the_distribution_that_brought_it_is_named(site, tmp_path):
    info = site / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    (info / "top_level.txt").write_text("kernels\n")
    (site / "kernels" / "compat.py").write_text(THEIRS["kernels/compat.py"])
    assert "another package named 'kernels' (kernels) is at" in importing(site, cwd=tmp_path)


def test_a_train_script_of_the_user_is_no_mistake(site, tmp_path):
    """duo_jax imports neither train nor convert, and many projects have files of these names."""
    (tmp_path / "train.py").write_text("x = 1\n")
    (tmp_path / "convert").mkdir()
    (tmp_path / "convert" / "__init__.py").touch()
    assert importing(site, cwd=tmp_path) == "ImportError: nothing was refused"


def test_another_train_package_in_an_environment(site, tmp_path):
    other = tmp_path / "environment" / "site-packages"
    (other / "train").mkdir(parents=True)
    (other / "train" / "__init__.py").touch()
    assert f"'train' (not installed by pip) is at {other}" in importing(other, site, cwd=tmp_path)


@pytest.mark.parametrize("value", [{"a": 1 << 99_999}, [1 << 99_999]], ids=["dict", "list"])
def test_what_holds_numbers_that_python_does_not_write_is_named(value):
    assert errors.quoted(value) == f"a {type(value).__name__} that cannot be shown"
