"""The pattern of a model for which a command line names none."""

import functools
import pathlib
import sys

from duo_jax.checkpoints import own_pattern
from duo_jax.model.config import ModelConfig


def find_pattern(folder: pathlib.Path, architecture: ModelConfig) -> pathlib.Path:
    """Return the pattern folder of a model, and say so where it is not in the model's own folder.

    Args:
      folder: the model's folder, or its GGUF file.
      architecture: the model.

    Raises:
      InputError: as `own_pattern.find_pattern`.
    """
    found = own_pattern.find_pattern(folder, architecture)
    if own_pattern.ships(found):
        _say(f"[heads: the pattern of {found.name} that ships]")
    return found


@functools.cache
def _say(line: str) -> None:
    """Print a line the first time; a command may look for the pattern of several loads."""
    print(line, file=sys.stderr)
