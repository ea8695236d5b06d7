"""Run a command: flags from a dataclass, and bad input reported in one line."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import jax
import tyro

from duo_jax import files
from duo_jax.cli import compile_cache
from duo_jax.errors import InputError
from duo_jax.process import signals, startup
from kernels.errors import UnsupportedError

Flags = TypeVar("Flags")


def run(
    main: Callable[[Flags], None],
    flags_type: type[Flags],
    *,
    prog: str,
    description: str,
    default: Callable[[], Flags] | None = None,
    args: Sequence[str] | None = None,
    keep_programs: bool = True,
) -> None:
    """Parse flags into a dataclass and run `main` on it; never returns on bad input.

    Input that cannot be used, and what the kernels refuse, prints one line, `error: ...`, and exits
    with code 2. Ctrl-C and SIGTERM print one line and exit with 130 and 143 (`signals.run`).
    Anything else is a defect of ours, and shows a traceback.

    Args:
      main: the command.
      flags_type: the dataclass of its flags; field comments and docstrings become the help text.
      prog: how the command is typed, such as "python -m convert".
      description: the first lines of --help.
      default: returns values to start from instead of the dataclass's own.
      args: the words of the command line; default sys.argv[1:].
      keep_programs: whether compiled programs are kept for later runs (`compile_cache`), which
        every command then lets its user switch off.
    """
    words = list(sys.argv[1:] if args is None else args)
    if keep_programs:
        description = f"{description.rstrip()}\n\n{compile_cache.HELP}"
        keep_programs = compile_cache.OFF not in words
        words = [word for word in words if word != compile_cache.OFF]

    def command() -> None:
        start = None if default is None else default()
        flags = _parse(flags_type, prog=prog, description=description, default=start, args=words)
        files.absolute(".")  # transformers cannot be imported in a folder that was removed
        if keep_programs:
            compile_cache.switch_on()
        main(flags)

    startup.end()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
        sys.stdout.reconfigure(errors="replace")
    signals.run(lambda: _run(command))


def fail(error: InputError | UnsupportedError) -> NoReturn:
    """Report in one line what cannot be used, and exit with code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def _run(command: Callable[[], None]) -> None:
    """Call a function; what its user or its machine is to blame for ends the process."""
    try:
        command()
    except (InputError, UnsupportedError) as error:
        fail(error)
    except BrokenPipeError:  # whoever read our output has seen enough
        _discard_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(InputError(f"not enough memory: {str(error).splitlines()[0]}"))
    except OSError as error:
        if not _stdout_fails():
            raise
        _discard_stdout()
        fail(InputError(f"standard output cannot be written: {error.strerror}"))


def _parse(
    flags_type: type[Flags],
    *,
    prog: str,
    description: str,
    default: Flags | None,
    args: Sequence[str] | None,
) -> Flags:
    """Parse flags; what tyro or the dataclass refuses is an InputError, --help exits."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                flags_type,
                prog=prog,
                description=description,
                args=args,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        text = _unboxed(complaint.getvalue())
        complained = re.sub(r"^Error parsing \w*(Config|Flags): ", "", text)
        raise InputError(f"{complained} (see {prog} --help)") from None


def _stdout_fails() -> bool:
    """Whether nothing can be printed, such as into a file on a full disk.

    Prints a line end: after an earlier error the buffer may be empty.
    """
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _discard_stdout() -> None:
    """Send the rest of our output nowhere: Python would try once more to write it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unboxed(text: str) -> str:
    """Reduce tyro's boxed complaint to what it says, without the excerpt of the help below it."""
    rows = [re.sub(r"[\u2500-\u257f]|-{5,}", " ", line).strip() for line in text.splitlines()]
    said = "\n".join(rows[1:]).strip().split("\n\n")[0]
    said = re.sub(r"(?<=\d,)\n(?=\d{3}\b)", "", said)  # lines are also broken within 1,000
    return " ".join(said.split())
