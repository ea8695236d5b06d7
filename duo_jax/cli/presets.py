"""Defaults of flags that a model brings: a JSON file, with fields of a dataclass.

It lies in the model's folder; for a model whose pattern ships with duo_jax, beside that pattern.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.own_pattern import find_shipped
from duo_jax.checkpoints.weights import has_weights
from duo_jax.errors import InputError
from duo_jax.schema.check import replace
from duo_jax.schema.json_reader import read_json

Config = TypeVar("Config")

# Not for a model folder to choose, which may come from anywhere: what is read and written.
_NOT_IN_A_PRESET = {"model", "pattern", "text", "workdir"}


def load(config: Config, file: pathlib.Path, *, part: str | None = None) -> Config:
    """Return a dataclass with the values of a preset.

    Args:
      config: values of the fields that the preset does not name.
      file: the preset; need not exist.
      part: the key of the file's JSON object that holds the preset; default: the whole object.

    Raises:
      InputError: the file holds no JSON object, or a field or value that the dataclass refuses.
    """
    if not files.present(file):
        return config
    values = read_json(file)
    where = files.shown(file)
    if part is not None:
        values, where = values.get(part, {}), f"{where}, {part}"
    for name in _NOT_IN_A_PRESET.intersection(values if isinstance(values, dict) else ()):
        raise InputError(f"{where} sets {name}, which is for whoever runs the command to choose")
    return replace(config, values, where)


def file_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the preset of a model; the file need not exist.

    Args:
      folder: the model's folder, or its GGUF file.
      name: the name of the preset's file.

    Raises:
      InputError: the model's files cannot be read.
    """
    own = folder / name
    if files.present(own) or not has_weights(folder):
        return own
    shipped = find_shipped(folder, pretrained.load_config(folder))
    return own if shipped is None else shipped / name


def defaults(
    args: Sequence[str] | None, model: str, load_for: Callable[[str, pathlib.Path], Config]
) -> Config:
    """Return a command's defaults, which depend on the model that it is given.

    tyro wants defaults before it parses, as it shows them in --help and checks flags together with
    them. So this one flag is read beforehand.

    Args:
      args: the words of a command line; None: the process's own.
      model: what --model is by default.
      load_for: returns the defaults for a model's name and folder.

    Returns:
      The defaults.

    Raises:
      InputError: the model or the preset cannot be used.
    """
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--model", default=model)
    with contextlib.suppress(argparse.ArgumentError):  # no value after --model; tyro reports it
        model = ahead.parse_known_args(sys.argv[1:] if args is None else list(args))[0].model
    return load_for(model, pretrained.resolve(model))
