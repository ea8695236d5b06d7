"""Defaults that a model brings along, as a JSON file in its folder: fields of a flags dataclass."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from duo_jax.errors import InputError

Config = TypeVar("Config")


def read(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Read a preset; empty where the model has none.

    Raises:
      InputError: the file is no JSON object.
    """
    file = folder / name
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is not a valid preset: {error}") from None


def apply(values: Mapping[str, Any], config: Config) -> Config:
    """Return a dataclass with some fields replaced, down into those that are dataclasses.

    The inverse of dataclasses.asdict, with JSON's lists for tuples.

    Raises:
      TypeError: there is no such field.
      ValueError: a value is not allowed.
    """
    changes = {}
    for name, value in values.items():
        before = getattr(config, name, None)
        if dataclasses.is_dataclass(before):
            value = apply(value, before)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **changes)


def named_model(args: Sequence[str] | None, default: str) -> str | None:
    """Look ahead for --model, whose preset decides the defaults of other flags.

    Returns:
      Its value; None where the flag is misused, about which the real parser will complain.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--model", default=default)
    try:
        return peek.parse_known_args(sys.argv[1:] if args is None else list(args))[0].model
    except argparse.ArgumentError:
        return None
