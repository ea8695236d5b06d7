"""The one reader of JSON, for files of ours and of others; what it costs is bounded by the text.

Stricter than Python's own: only UTF-8, no NaN or infinity (they are not JSON), no number that
overflows, no key twice in an object (readers differ in which one counts), bounded size, depth,
number of parts and digits. Types are the business of `duo_jax.schema.check`.
"""

import itertools
import json
import math
import pathlib
import re
from typing import Any

from duo_jax import files
from duo_jax.errors import InputError, quoted

MAX_BYTES = 16 << 20  # the largest index of a published model has 9 MB
_MAX_DEPTH = 64
_MAX_PARTS = 1_000_000  # values and separators; an empty list has 2 characters, and takes 64 bytes
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
    try:
        _check_number_of_parts(text)
        value = _DECODER.decode(text)
        _check_depth(value, text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where} {_TOO_DEEP}") from None
    except InputError as error:
        raise InputError(f"{where} {error}") from None
    return value


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
