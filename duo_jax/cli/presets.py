"""Defaults that a model brings along, as a JSON file in its folder: fields of a flags dataclass."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from duo_jax import cli
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.files import is_file, read_json

Config = TypeVar("Config")


def load(config: Config, file: pathlib.Path, *, part: str | None = None) -> Config:
    """Return a dataclass with the fields that a preset changes.

    Args:
      config: the dataclass.
      file: the preset; need not exist.
      part: the preset is what the file has under this name.

    Raises:
      InputError: the file is no JSON object, or holds what the dataclass does not take.
    """
    if not is_file(file):
        return config
    values = read_json(file)
    try:
        return _replace(config, values if part is None else values.get(part, {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a valid preset: {error}") from None


def defaults(
    args: Sequence[str] | None, model: str, load_for: Callable[[str, pathlib.Path], Config]
) -> Config | None:
    """Look ahead for --model, whose preset decides the defaults of other flags.

    Args:
      args: the words of a command line; None: the process's own.
      model: what --model is by default.
      load_for: returns the defaults for a model's name and folder.

    Returns:
      The defaults; None where the flag is misused, about which the real parser will complain. A
      model or a preset that cannot be used ends the process.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--model", default=model)
    try:
        name = peek.parse_known_args(sys.argv[1:] if args is None else list(args))[0].model
        return load_for(name, pretrained.resolve(name))
    except argparse.ArgumentError:
        return None
    except InputError as error:
        cli.fail(error)


def _replace(config: Config, values: Mapping[str, Any]) -> Config:
    """Replace fields, down into those that are dataclasses; the inverse of dataclasses.asdict."""
    changes = {}
    for name, value in values.items():
        before = getattr(config, name, None)
        if dataclasses.is_dataclass(before):
            value = _replace(before, value)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **changes)
