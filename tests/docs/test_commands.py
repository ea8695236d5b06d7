"""Every command that README and pages show exists, and takes the flags that they give it.

Commands are parsed by the real parser, and end there. What README's "try it" prints is tested in
tests/test_readme.py, the planner's example in tests/duo_jax/plan. A block that cannot be run as it
stands in a minute on a CPU says so in a comment above it: `needs: gpu`, `needs: download`, `takes
minutes`, or several of them.
"""

import dataclasses
import importlib.util
import pathlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest

from docs import line_numbers
from duo_jax import __main__ as duo_jax_command
from duo_jax import cli
from duo_jax.checkpoints import pretrained
from duo_jax.process import signals, startup

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [*line_numbers.pages(), ROOT / "duo_jax/demo/README.md"]
OURS = ("duo_jax", "train", "convert", "benchmarks")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MARKS = {"needs: gpu", "needs: download", "takes minutes"}
# What starts with these words needs no check of ours, or is tested where it is made.
OTHERS = (
    ["python3", "-m", "venv"],
    [".", ".venv/bin/activate"],
    ["pre-commit", "install"],
    ["mkdocs", "serve"],
    ["mkdocs", "build", "--strict"],  # test_site.py
    [".ci/run"],
    [".venv/bin/ruff"],
    [".venv/bin/python", "-m", "pytest"],
    ["python", "-m", "pytest"],
    ["python", "-m", "nltk.downloader", "punkt_tab"],
)
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command of a page."""

    page: pathlib.Path
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text}"


def blocks(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the fenced bash blocks of a page, with the marks above each."""
    for mark, block in re.findall(
        r"(?:<!-- ((?:needs|takes).*?) -->\n)?^```bash\n(.*?)^```", text, re.M | re.S
    ):
        marks = re.sub(r"needs: (\w+), (\w+)", r"needs: \1, needs: \2", mark)
        yield block.replace("\\\n", " "), {part for part in marks.split(", ") if part}


def commands() -> Iterator[Shown]:
    """Yield every command in a block, or in a line of text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block, _ in blocks(text):
            for line in block.splitlines():
                for command in line.split(" && "):
                    if shlex.split(command, comments=True):
                        yield Shown(page, command)
        for command in re.findall(r"`((?:python -m|duo-jax|pip install) [^`]+)`", text):
            yield Shown(page, command)


COMMANDS = list(dict.fromkeys(commands()))


def run_of(words: list[str]) -> Callable[[], object]:
    """Return what runs a command in this process, up to the end of its parser."""
    if words[0] == "duo-jax":
        return lambda: duo_jax_command.main(words[1:])
    module = words[2]
    return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture
def parsed(monkeypatch) -> list[object]:
    """Have commands end when their flags are parsed; return the list of what they would run on."""
    seen: list[object] = []
    run = cli.run

    def only_parse(main, config_type, **options):
        del main
        run(seen.append, config_type, **options)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "run", only_parse)
    # pytest has other things to end, and the benchmarks begin without the commands' start.
    monkeypatch.setattr(startup, "begin", lambda: None)
    monkeypatch.setattr(signals, "end_at_once", lambda: None)
    # runpy would keep what the type checker made of a module as the module's own compiled form,
    # which no process without that checker can import.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # Pages name models "M"; flags whose defaults depend on the model take the demo's.
    demo = pretrained.resolve(pretrained.DEMO)
    monkeypatch.setattr(pretrained, "resolve", lambda *_, **__: demo)
    monkeypatch.setattr("benchmarks.gpu.settings.has_gpu", lambda: False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # benchmarks.gpu_report sets it
    return seen


def is_ours(words: list[str]) -> bool:
    """Say whether a command is one of this project's, with flags to be parsed."""
    return words[0] == "duo-jax" or (
        words[:2] == ["python", "-m"] and words[2].split(".")[0] in OURS
    )


@pytest.mark.parametrize("shown", [c for c in COMMANDS if is_ours(c.words)], ids=str)
def test_flags_of_our_commands_parse(shown, parsed, monkeypatch, capsys):
    words = shown.words
    monkeypatch.setattr(sys, "argv", ["", *words[3:]])
    try:
        run_of(words)()
    except SystemExit as exit_:
        said = capsys.readouterr()
        helped = exit_.code == 0 and said.out.startswith("usage:")
        assert helped or "this report needs a GPU" in said.err, said.err
        return
    assert parsed or capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("shown", [c for c in COMMANDS if not is_ours(c.words)], ids=str)
def test_other_commands_are_known(shown):
    words = shown.words
    if words[:2] == ["python", "-c"]:
        for name in re.findall(r"import ([\w., ]+?)(?: as \w+)?;", words[2])[0].split(", "):
            assert importlib.util.find_spec(name.split(" as ")[0].split(".")[0])
        compile(words[2], shown.text, "exec")
    elif words[:2] in (["pip", "install"], [".venv/bin/pip", "install"]):
        assert not set(words[2:]) - {"-q", "-e"} - _targets()
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("docs", "tests"):
        assert importlib.util.find_spec(words[2])
        assert set(words[3:]) <= {"--check"}
    else:
        assert any(words[: len(known)] == known for known in OTHERS), shown.text


def _targets() -> set[str]:
    """Return what pip may install: this package, with one of its extras, or pre-commit."""
    return {".", "pre-commit"} | {f".[{extra}]" for extra in EXTRAS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_known(page):
    for _, marks in blocks(page.read_text(encoding="utf-8")):
        assert marks <= MARKS


def test_a_flag_that_does_not_exist_is_found(parsed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--no-such-flag", "1"])
    with pytest.raises(SystemExit):
        run_of(["python", "-m", "duo_jax.plan"])()
    assert not parsed


def test_the_pages_have_commands():
    assert len(COMMANDS) > 40
    assert {c.page.name for c in COMMANDS} >= {"README.md", "serving.md", "evaluate.md", "gpu.md"}
