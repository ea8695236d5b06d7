"""Types and ranges, enforced by msgspec: of what a file holds, a dataclass, or an argument.

msgspec checks without converting between kinds (true is no number, "3" is no 3, 2.0 is no 2), knows
dataclasses, and takes 25 ms to import, where pydantic takes 100.
"""

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Collection
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from duo_jax import files
from duo_jax.errors import InputError, quoted

Kind = TypeVar("Kind")


def convert(values: Any, kind: type[Kind] | Any, where: str) -> Kind:
    """Return what a file holds as a `kind`: a type, a dataclass or a msgspec.Struct.

    A key that a dataclass or Struct does not name is ignored, unless the Struct forbids it.

    Args:
      values: as the JSON reader returned them.
      kind: the type, such as list[int] too, with ranges as in `duo_jax.schema.kinds`.
      where: the file, for messages.

    Raises:
      InputError: says which value is wrong, where, and what is accepted.
    """
    return _convert(values, kind, where)


def argument(name: str, value: Any, kind: Any) -> Any:
    """Return an argument of the Python API, numpy's scalars as Python's.

    Raises:
      InputError: it is of another type, or out of range.
    """
    if isinstance(value, np.generic):
        value = value.item()
    try:
        if (
            isinstance(kind, type)
            and dataclasses.is_dataclass(kind)
            and not isinstance(value, kind)
        ):
            raise msgspec.ValidationError  # it would make one of a dict
        found = msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):
        item = _item_kind(kind)
        if item is not None and isinstance(value, list | tuple):
            return type(value)(argument(name, each, item) for each in value)
        raise InputError(f"{name} {quoted(value)} is not {describe(kind)}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise InputError(f"{name} {found} is not a finite number")
    return found


def path_argument(name: str, value: Any) -> None:
    """Refuse an argument that is no path.

    Raises:
      InputError: it is neither a text nor a path, or holds characters that no file's name can.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise InputError(f"{name} {quoted(value)} is neither a text nor a path")
    try:
        files.check_name(os.fspath(value))
    except InputError as error:
        raise InputError(f"{name} {error}") from None


def describe(kind: Any) -> str:
    """Return what a kind accepts, in words: "a whole number from 1 to 2,147,483,647"."""
    members = [member for member in _members(kind) if member is not type(None)]
    return " or ".join(map(_describe_one, members))


def check_fields(instance: Any, *, but: Collection[str] = ()) -> None:
    """Check every field of a dataclass against its annotation; meant for __post_init__.

    Fields that hold numpy's scalars get Python's in their place. Those named in `but` are left out.

    Raises:
      InputError: names the field, its value and what is accepted.
    """
    for name, kind in field_kinds(type(instance)).items():
        if name in but:
            continue
        value = getattr(instance, name)
        found = argument(name, value, kind)
        if isinstance(value, np.generic):
            object.__setattr__(instance, name, found)


def replace(instance: Any, values: Any, where: str) -> Any:
    """Return a dataclass with the fields that a file names, down into those that are dataclasses.

    Args:
      instance: the dataclass.
      values: as the JSON reader returned them.
      where: the file, for messages.

    Raises:
      InputError: a field does not exist or has another type, or the dataclass refuses its value.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} is {quoted(values)}, not a JSON object")
    kinds = field_kinds(type(instance))
    changes = {}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{where} names {quoted(name)}; known: {', '.join(kinds)}")
        before = getattr(instance, name)
        place = f"{where}, {name}"
        nested = dataclasses.is_dataclass(before)
        changes[name] = (
            replace(before, value, place) if nested else _convert(value, kinds[name], place)
        )
    try:
        return dataclasses.replace(instance, **changes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@functools.cache
def field_kinds(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass, ranges included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _convert(values: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise InputError(_complaint(str(error), values, where)) from None
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half characters that no text can hold") from None


def _complaint(message: str, values: Any, where: str) -> str:
    """Say what is wrong with the value that msgspec's message points to."""
    what, _, path = message.partition(" - at `$")
    keys = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path.rstrip("`"))
    name = "".join(f".{key}" if key else f"[{index}]" for key, index in keys).lstrip(".")
    value = values
    try:
        for key, index in keys:
            value = value[key] if key else value[int(index)]
    except (KeyError, IndexError, TypeError):
        return f"{where}: {name}: {_in_words(what)}"
    if "[...]" in path or "missing" in what:
        return f"{where}{f', {name}' if name else ''}: {_in_words(what)}"
    return f"{where}{f': {name}' if name else ''} is {quoted(value)}: {_in_words(what)}"


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _item_kind(kind: Any) -> Any:
    """Return the kind of a tuple's or list's items; None if it is neither."""
    for member in _members(kind):
        if typing.get_origin(member) in (tuple, list):
            return typing.get_args(member)[0]
    return None


def _describe_one(kind: Any) -> str:
    plain, *notes = typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind,)
    if typing.get_origin(plain) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(plain)))}"
    if typing.get_origin(plain) in (tuple, list):
        return f"a list, each item {describe(_item_kind(plain))}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    text = words.get(plain, "of the expected type")
    for note in notes:
        if isinstance(note, msgspec.Meta):
            text += "" if note.gt is None else f" above {_number(note.gt)}"
            text += "" if note.ge is None else f" from {_number(note.ge)}"
            up_to = " to " if note.gt is None else ", at most "
            text += "" if note.le is None else f"{up_to}{_number(note.le)}"
            if note.max_length is not None:
                text += f" of at most {note.max_length:,} characters"
    return text


def _number(bound: Any) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


# msgspec's words for types, in ours.
_WORDS = {
    "`int`": "a whole number",
    "`float`": "a number",
    "`str`": "a text",
    "`bool`": "true or false",
    "`object`": "an object",
    "`array`": "a list",
    "`null`": "null",
}


def _in_words(message: str) -> str:
    """Return msgspec's message in plain words: "expected a whole number >= 1"."""
    message = message.split(", got")[0]
    message = re.sub(
        r"`([a-z]+(?: \| [a-z]+)+)`",
        lambda union: " or ".join(_WORDS.get(f"`{k}`", k) for k in union[1].split(" | ")),
        message,
    )
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]
