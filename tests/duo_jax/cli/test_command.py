"""Errors of commands: one line for what they refuse, a traceback for a defect."""

import dataclasses
import io
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import kernels
from duo_jax import cli
from duo_jax.errors import InputError

THOUSANDS = " to".join(["1,000"] * 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of a command."""

    number: int = 1
    """A number."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise InputError("number must not be negative")
        if self.number == 10:
            raise InputError(THOUSANDS)


def run(main, *args: str) -> None:
    cli.run(main, Flags, prog="python -m test", description="A test.", args=args)


def error_line(capsys, main, *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(main, *args)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_flags_reach_the_command():
    seen = []
    run(seen.append, "--number", "3")
    assert seen == [Flags(number=3)]


def test_a_current_folder_that_was_removed_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert error_line(capsys, lambda _: None).endswith("the current folder was removed")


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run(lambda _: print("caf\xe9 \udcff", flush=True))
    assert out.buffer.getvalue() == b"caf? ?\n"


def refuse(_: Flags) -> None:
    raise InputError("two\nlines")


def too_large_for_a_kernel(_: Flags) -> None:
    """Trace attention over more elements than a kernel can address."""
    outs = jax.ShapeDtypeStruct((2, 2**21, 8, 128), jnp.bfloat16)
    lses = jax.ShapeDtypeStruct((2, 2**21, 8), jnp.float32)
    jax.eval_shape(lambda *x: kernels.merge_lse(*x, implementation="interpret"), outs, lses)


def gpu_wanted(_: Flags) -> None:
    kernels.merge_lse(jnp.ones((2, 1, 1, 16)), jnp.ones((2, 1, 1)), implementation="triton")


@pytest.mark.parametrize(
    ("main", "args", "message"),
    [
        (refuse, [], "two lines"),
        (refuse, ["--number", "-1"], "number must not be negative"),
        (refuse, ["--numer", "1"], "(see python -m test --help)"),
        (refuse, ["--number", "10"], THOUSANDS + " (see"),  # in lines, some of which end in "1,"
        (too_large_for_a_kernel, [], "4,294,967,296 elements; offsets inside a kernel end at"),
        (gpu_wanted, [], "implementation='triton' needs an NVIDIA GPU"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(capsys, main, args, message):
    line = error_line(capsys, main, *args)
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "ours.txt"),
        NotImplementedError("a lowering rule that jax lacks"),
        ValueError("a bug"),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_defect_of_ours_is_no_mistake_of_the_user(capsys, error):
    def main(_: Flags) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run(main)
    assert raised.value is error
    assert capsys.readouterr().err == ""


def test_defaults_are_made_inside_of_the_same_net(capsys):
    def refused() -> Flags:
        raise InputError("no such model")

    def interrupted() -> Flags:
        raise KeyboardInterrupt

    for default, code, line in (
        (refused, 2, "error: no such model"),
        (interrupted, 130, "interrupted"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.run(refuse, Flags, prog="test", description="", default=default, args=[])
        assert ended.value.code == code
        assert capsys.readouterr().err == f"{line}\n"
    seen = []
    cli.run(
        seen.append, Flags, prog="test", description="", default=lambda: Flags(number=7), args=[]
    )
    assert seen == [Flags(number=7)]


def test_what_cannot_be_saved_on_a_signal_is_said_before_it(capsys):
    def main(_: Flags) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise InputError("the disk is full")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "error: the disk is full\nterminated\n"


PRINTS = """
from duo_jax import cli
from tests.duo_jax.cli.test_command import Flags
cli.run(lambda _: print("x" * 100_000), Flags, prog="test", description="A test.", args=[])
"""


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line == "error: standard output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_help_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, "-m", "duo_jax.plan", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as head does
        complaint = process.stderr.read().decode()
        assert process.wait() == 128 + signal.SIGPIPE
    assert "Traceback" not in complaint
