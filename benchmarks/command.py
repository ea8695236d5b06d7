"""The command line of a benchmark."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from duo_jax import cli
from duo_jax.process import signals

Flags = TypeVar("Flags")


def run(main: Callable[[Flags], None], flags_type: type[Flags], **options: Any) -> None:
    """Run `main` on parsed flags; --help begins as the docstring of its module does.

    Args:
      main: the command.
      flags_type: the dataclass of its flags.
      **options: of `cli.run`.
    """
    signals.end_at_once()
    module = sys.modules[main.__module__]
    name = module.__name__ if module.__spec__ is None else module.__spec__.name
    description = (module.__doc__ or "").split("\n\n")[0]
    cli.run(
        main,
        flags_type,
        prog=f"python -m {name}",
        description=description,
        **{"keep_programs": False, **options},  # some measure the compiler
    )
