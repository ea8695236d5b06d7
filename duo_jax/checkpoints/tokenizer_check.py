"""Checks of a tokenizer's files before any library reads them.

The library `tokenizers` refuses most of what is wrong in a tokenizer.json. What is refused here
would end the process (a panic while another is handled), or take memory without a bound: a few
replacements in a row turn one letter into gigabytes. Its vocabulary and merges, nearly all of the
file, are not parsed here.
"""

import math
import pathlib
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from duo_jax import files
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import parse_json, read_json

_LARGEST = 64 << 20  # bytes; Gemma's has 33 MB
_LARGEST_PARTS = ("vocab", "merges")  # of the model; left to tokenizers
_MOST_GROWTH = 256  # characters that one may become; published tokenizers have 1 to 10
_MOST_OBJECTS = 4_096  # in all components together
_MOST_ITEMS = 1_024  # of a list in them
_LONGEST_REGEX = 8_192  # characters; those in use have 700
_LONGEST_TEXT = 256  # of any other text in them
_LONGEST_WORD = 10_000  # characters; WordPiece takes the square of it, and has 100
_MOST_PADDING = 1 << 20
_UNBOUNDED = ("precompiled_charsmap",)
# A key of an object, and what stands around it.
_KEY = re.compile(rb'[\s,{]*"([^"\\]*)"\s*:\s*')


class _Settings(msgspec.Struct):
    model_max_length: Annotated[float, msgspec.Meta(gt=0)] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None


def check_tokenizer_files(folder: pathlib.Path, names: tuple[str, ...]) -> None:
    """Refuse tokenizer files that no library should be given.

    Args:
      folder: a model's.
      names: of the files; need not exist.

    Raises:
      InputError: says which file, and what is wrong with it.
    """
    for name in names:
        path = folder / name
        if not files.present(path):
            continue
        with files.reading(path):
            size = path.stat().st_size
        if size > _LARGEST:
            raise InputError(f"{files.shown(path)} has more than {_LARGEST:,} bytes")
        if name == "tokenizer.json":
            _check_tokenizer(path)
        elif name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            values = read_json(path)
            if name == "tokenizer_config.json":
                convert(values, _Settings, files.shown(path))


def _check_tokenizer(path: pathlib.Path) -> None:
    where = files.shown(path)
    with files.reading(path), files.open_binary(path) as file:
        content = file.read(_LARGEST)
    parts = _values(content, where)
    model = parts.pop("model", b"{}")
    parts.pop("added_tokens", None)
    components = {name: _parsed(part, f"{where}, {name}") for name, part in parts.items()}
    if sum(1 for _ in _objects(list(components.values()))) > _MOST_OBJECTS:
        raise InputError(f"{where} has more than {_MOST_OBJECTS:,} components")
    for name, component in components.items():
        _check_component(component, f"{where}, {name}")
    padding = [components.get("padding")]
    numbers = (n for each in _objects(padding) for n in each.values() if isinstance(n, int))
    if max(numbers, default=0) > _MOST_PADDING:
        raise InputError(f"{where}, padding: it is longer than {_MOST_PADDING:,} tokens")
    if model.lstrip().startswith(b"{"):
        _check_model(_values(model, f"{where}, model"), f"{where}, model")


def _values(content: bytes, where: str) -> dict[str, bytes]:
    """Return the values of a JSON object, unparsed."""
    try:
        found = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deep") from None
    values = {key: bytes(value) for key, value in found.items()}
    left, place = dict(values), 0
    while left:  # msgspec keeps the last of several values, and says nothing
        key = _KEY.match(content, place)
        value = left.pop(key[1].decode("utf-8", "replace"), None) if key else None
        if key is None or value is None or not content.startswith(value, key.end()):
            break
        place = key.end() + len(value)
    if left or content[place:].strip(b" \t\r\n{") != b"}":
        raise InputError(f"{where} has a key twice in one object, or escapes in a key")
    return values


def _parsed(part: bytes, where: str) -> Any:
    try:
        return parse_json(part.decode(), where)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text") from None


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a component and those within it: those of older files do not name their types."""
    left = [part]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            yield each
        left += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()


def _check_component(component: Any, where: str) -> None:
    growth = 1
    for each in _objects(component):
        for name, value in each.items():
            longest = _LONGEST_REGEX if name == "Regex" else _LONGEST_TEXT
            if isinstance(value, str) and len(value) > longest and name not in _UNBOUNDED:
                raise InputError(f"{where}: {quoted(name)} has more than {longest:,} characters")
            if isinstance(value, list) and len(value) > _MOST_ITEMS:
                raise InputError(f"{where}: {quoted(name)} has more than {_MOST_ITEMS:,} items")
        growth *= _growth(each)
        if growth > _MOST_GROWTH:
            raise InputError(
                f"{where}: its replacements make a text more than {_MOST_GROWTH} times as long"
            )


def _growth(component: dict[str, Any]) -> int:
    """Return how many characters one may become where a pattern is replaced by a content."""
    pattern, content = component.get("pattern"), component.get("content")
    if not isinstance(pattern, dict) or not isinstance(content, str) or not content:
        return 1
    replaced = pattern.get("String")
    if isinstance(replaced, str) and replaced:
        return math.ceil(len(content) / len(replaced))
    return len(content) + 1  # in front of every character


def _check_model(model: dict[str, bytes], where: str) -> None:
    small = {
        name: _parsed(part, f"{where}, {name}")
        for name, part in model.items()
        if name not in _LARGEST_PARTS
    }
    _check_component(small, where)
    longest = small.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > _LONGEST_WORD:
        raise InputError(f"{where}: max_input_chars_per_word is above {_LONGEST_WORD:,}")
    prefix = small.get("continuing_subword_prefix")
    if small.get("type", "BPE") == "BPE" and isinstance(prefix, str) and prefix:
        _check_merges(_parsed(model.get("merges", b"[]"), where), prefix, where)


def _check_merges(merges: Any, prefix: str, where: str) -> None:
    """Refuse merges whose second halves lack the prefix that tokenizers would cut off."""
    for merge in merges if isinstance(merges, list) else ():
        halves = merge.split(" ", 1) if isinstance(merge, str) else merge
        second = halves[-1] if isinstance(halves, list) and halves else None
        if not isinstance(second, str) or not second.startswith(prefix) or not prefix.isascii():
            raise InputError(
                f"{where}: continuing_subword_prefix is {quoted(prefix)}, which the merge "
                f"{quoted(merge)} lacks"
            )
