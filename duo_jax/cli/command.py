"""How every command of this project parses its flags and reports bad input."""

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

from duo_jax.errors import InputError

Config = TypeVar("Config")


def run(
    main: Callable[[Config], None],
    config_type: type[Config],
    *,
    prog: str,
    description: str,
    default: Config | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parse flags into a config dataclass and run `main` on it; never returns on bad input.

    Input that cannot be used prints one line, `error: ...`, and exits with code 2. Ctrl-C prints
    one line and exits with 130.

    Args:
      main: the command.
      config_type: its dataclass; field comments and docstrings become the help text.
      prog: how the command is typed, such as "python -m convert".
      description: the first lines of --help.
      default: values to start from instead of the dataclass's own.
      args: the words of the command line; default sys.argv[1:].
    """
    given = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_type, prog=prog, description=description, args=args, **given)
    except InputError as error:  # from a dataclass within the dataclass
        fail(error)
    except SystemExit as exit_:
        if exit_.code:
            complained = re.sub(r"^Error parsing \w*Config: ", "", _unboxed(complaint.getvalue()))
            fail(InputError(f"{complained} (see {prog} --help)"))
        raise
    try:
        main(config)
    except InputError as error:
        fail(error)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(InputError(f"not enough memory: {str(error).splitlines()[0]}"))
    except OSError as error:  # a full disk, a name too long, a folder nobody may read
        where = f"{str(error.filename)[:80]}: " if error.filename else ""
        fail(InputError(f"{where}{error.strerror or error}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: InputError) -> NoReturn:
    """Report input that cannot be used, and exit."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def _unboxed(text: str) -> str:
    """Reduce tyro's boxed complaint to what it says, without the excerpt of the help below it."""
    rows = [re.sub(r"[\u2500-\u257f]|-{5,}", " ", line).strip() for line in text.splitlines()]
    rows = " ".join(row or "\n" for row in rows[1:]).strip().split("\n")
    return rows[0].strip()
