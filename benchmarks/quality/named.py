"""Patterns as benchmarks take them on the command line: NAME=FOLDER each."""

from collections.abc import Sequence

from duo_jax.errors import InputError


def split(patterns: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and the folder of every pattern.

    Raises:
      InputError: one has no name or no folder.
    """
    pairs = [pattern.partition("=") for pattern in patterns]
    for pattern, pair in zip(patterns, pairs, strict=True):
        if not all(pair):
            raise InputError(f"pattern {pattern!r} is not NAME=FOLDER")
    return [(name, folder) for name, _, folder in pairs]
