"""The one reader of JSON, for files of ours and of others; what it costs is bounded by the text.

Stricter than Python's own: only UTF-8, no NaN or infinity (they are not JSON), no number that
overflows, no key twice in an object (readers differ in which one counts), bounded size, depth,
number of parts and digits. Types are the business of `duo_jax.schema.check`.
"""

import contextlib
import io
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from duo_jax import files
from duo_jax.errors import InputError, quoted

MAX_BYTES = 16 << 20  # the largest index of a published model has 9 MB
_MAX_DEPTH = 64
_MAX_PARTS = 1_000_000  # values and separators; an empty list has 2 characters, and takes 64 bytes
_STEP = 1 << 20  # characters of a list that are read at once
_SPACE = re.compile(r"[ \t\n\r]*")
_EMPTY_LIST = re.compile(r"\s*\[\s*\]\s*")
_MAX_DIGITS = 100  # transformers writes an endless model_max_length with 31


def read_json(path: str | pathlib.Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      InputError: the file cannot be read, is larger than `max_bytes`, is not JSON as above, or
        holds something else than an object.
    """
    values = parse_json(files.read_text(path, max_bytes=max_bytes), files.shown(path))
    if not isinstance(values, dict):
        raise InputError(f"{files.shown(path)} holds no JSON object")
    return values


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Args:
      text: the whole text.
      where: the file, or the file and its line, for messages.

    Raises:
      InputError: with `where` and, where it is known, the place.
    """
    with _about(where):
        _check_number_of_parts(text)
        value = _DECODER.decode(text)
        _check_depth(value, text)
    return value


def parse_list(begin: str, rest: io.TextIOBase, where: str, *, longest: int) -> Iterator[Any]:
    """Yield the entries of a list, which is never in memory as a whole.

    Args:
      begin: the first characters of the file, the opening bracket among them.
      rest: the others.
      where: the file, for messages.
      longest: characters that an entry may have.

    Raises:
      InputError: with `where` and the number of the entry.
    """
    if _EMPTY_LIST.fullmatch(begin):
        return
    text, at = begin, begin.index("[")  # where an entry's bracket or comma is
    for number in itertools.count():
        place = f"{where}, entry {number}"
        while (found := _entry(text, at + 1, place)) is None:  # cut off, or not JSON
            more = rest.read(max(_STEP, len(text) - at))
            text, at = text[at:] + more, 0
            if not more:
                raise InputError(f"{place} is not JSON, or the file is cut short")
            if len(text) > longest:
                raise InputError(f"{place} is not JSON, or has more than {longest:,} characters")
            with _about(place):
                _check_number_of_parts(text)
        value, at = found
        yield value
        if text[at] == "]":
            break
    tail = text[at + 1 :]
    while tail:
        if not tail.isspace():
            raise InputError(f"{where} is not JSON: something follows its list")
        tail = rest.read(_STEP)


def _entry(text: str, at: int, where: str) -> tuple[Any, int] | None:
    """Return a list's entry and where its comma or the closing bracket is; None if it has none."""
    start = _end_of_space(text, at)
    try:
        with _about(where):
            value, end = _DECODER.raw_decode(text, start)
            _check_depth(value, text[start:end])
    except _NotJsonError:
        return None
    end = _end_of_space(text, end)
    return (value, end) if text[end : end + 1] in (",", "]") else None


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "it matches nothing, too"
    return found.end()


class _NotJsonError(InputError):
    """The text is not JSON; a longer one that begins with it may be."""


@contextlib.contextmanager
def _about(where: str) -> Iterator[None]:
    """Have the errors of a block that decodes JSON say where it is."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise _NotJsonError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where} {_TOO_DEEP}") from None
    except InputError as error:
        raise InputError(f"{where} {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise InputError(f"has the key {quoted(twice)} twice in one object")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise InputError(f"holds a number of {len(digits):,} digits: {quoted(digits)}")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise InputError(f"holds a number beyond float64: {quoted(digits)}")
    return number


def _constant(name: str) -> float:
    raise InputError(f"is not JSON: {name} is no number there")


# Made once: files of JSON lines have hundreds of thousands.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
)
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} deep"
# A text, or the beginning of a value or of what follows one.
_PART = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[,\[{]', re.DOTALL)


def _check_number_of_parts(text: str) -> None:
    if len(text) <= _MAX_PARTS or sum(map(text.count, '",[{')) <= _MAX_PARTS:
        return
    # There may be many commas within a text.
    if next(itertools.islice(_PART.finditer(text), _MAX_PARTS, None), None) is not None:
        raise InputError(f"holds more than {_MAX_PARTS:,} values and separators")


def _check_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") <= _MAX_DEPTH:
        return
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise InputError(_TOO_DEEP)
