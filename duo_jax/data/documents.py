"""Long text to hide passkeys in: files, folders, JSON lines, hub data sets, or Python's own manual.

The default needs no download: `pydoc_data.topics`, the language reference that every Python
installation carries (about 465 KB; it differs a little between Python versions).
"""

import codecs
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

from duo_jax.data.packed_text import ZstdReader
from duo_jax.errors import InputError
from duo_jax.files import is_file, is_folder, reading, shown
from duo_jax.schema.json_reader import parse_json, parse_list

# Enough for any haystack; reading on would only cost time and memory.
_MAX_CHARACTERS = 50_000_000
_AT_LEAST = 512  # characters that a document counts for, or an empty line: packed, it has no size
_LONGEST_LINE = 1 << 24  # characters of a line of JSON; one with an emoji takes 4 bytes for each
_PIECE = 1 << 20  # characters, or bytes of a plain text, that are read at once
_CONTINUING = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
_MOST_FILES = 100_000  # in a folder, before somebody waits for an answer about "/"
# In any case of letters, and packed (.zst) too. A .json file is read where it is named: in folders
# they hold settings more often than texts.
_PLAIN = (".txt", ".md", ".rst")
_LINES = (".jsonl", ".ndjson")
_TEXT_SUFFIXES = (*_PLAIN, *_LINES)
_PACKED = ".zst"
_TEXT_KEYS = ("text", "content", "chapter", "document", "article")


def load_documents(sources: Sequence[str]) -> list[str]:
    """Read documents in a fixed order.

    Args:
      sources: text files, folders (searched for .txt, .md, .rst, .jsonl and .ndjson, which may be
        packed as .zst), or names of Hugging Face data sets (needs the extra `datasets`). JSON lines
        hold their text under "text", "content", "chapter", "document" or "article"; a .json file
        holds such lines, or one list of texts or of such objects. Empty: the built-in text.

    Returns:
      Non-empty documents, at most 50 million characters in all; short ones count for 512.

    Raises:
      InputError: a source does not exist, cannot be read or holds no text.
    """
    if not sources:
        return _built_in()
    documents, characters = [], 0
    for document in itertools.chain.from_iterable(map(_read_source, sources)):
        if document and not document.isspace():
            documents.append(document[: _MAX_CHARACTERS - characters])
        characters += max(len(document), _AT_LEAST)
        if characters >= _MAX_CHARACTERS:
            break
    if not documents:
        raise InputError(f"no text found in {', '.join(sources)}")
    return documents


def text_digest(documents: Sequence[str]) -> str:
    """Return a digest of documents, and of which of them are held out."""
    split = itertools.chain.from_iterable(split_held_out(documents))
    return hashlib.sha256("\0".join(split).encode("utf-8", "replace")).hexdigest()


def split_held_out(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into training and held-out text, a tenth of the characters.

    The tenth of every ten documents is held out first, then the ninth of every ten, and so on,
    until they have a tenth of all characters. The last of them is cut if it has more than is
    missing: its end is held out, from the start of a paragraph if one begins near the cut, else of
    a line or a word. With fewer than ten documents this is the end of the text.

    Earlier versions held out the tenth of every ten documents and nothing else, 2.3% of the
    built-in text. The demo model, its pattern and the committed results were made with that split.
    So those documents come first, and stay held out; the rest of what is held out now was training
    text for the demo model and its pattern. Passkeys hidden in it are new in either case.

    Returns:
      Training documents and held-out documents, each in their original order.
    """
    missing = -(-sum(map(len, documents)) // 10)
    cuts = [len(document) for document in documents]  # what follows the cut is held out
    for last in range(9, -1, -1):
        for index in range(last, len(documents), 10):
            cuts[index] = _cut(documents[index], missing)
            missing -= len(documents[index]) - cuts[index]
    training = [document[:cut] for document, cut in zip(documents, cuts, strict=True) if cut]
    held_out = [
        document[cut:] for document, cut in zip(documents, cuts, strict=True) if cut < len(document)
    ]
    return training, held_out


def _cut(document: str, missing: int) -> int:
    """Return where to cut so that at least `missing` characters, or all of them, come after."""
    if missing <= 0:
        return len(document)
    latest = max(0, len(document) - missing)
    earliest = max(0, latest - missing // 10)
    for mark in ("\n\n", "\n", " "):
        found = document.rfind(mark, earliest, latest)
        if found >= 0:
            return found + len(mark)
    return latest


def _built_in() -> list[str]:
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


def _read_source(source: str) -> Iterator[str]:
    if not source:
        raise InputError("--text got an empty name; leave it out for the built-in text")
    path = pathlib.Path(source)
    if is_folder(path):
        files = _text_files(path)
        if not files:
            raise InputError(f"{path} holds no {', '.join(_TEXT_SUFFIXES)} files")
        return itertools.chain.from_iterable(map(_read_file, files))
    if is_file(path):
        return _read_file(path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _read_dataset(source)
    raise InputError(f"no such text: {source} (a file, a folder or a data set's name is needed)")


def _text_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found, seen = [], 0
    for place, _, names in os.walk(folder):
        seen += 1 + len(names)
        if seen > _MOST_FILES:
            raise InputError(
                f"{folder} holds more than {_MOST_FILES:,} files and folders; name a smaller one"
            )
        files = (pathlib.Path(place, name) for name in names if _ending(name) in _TEXT_SUFFIXES)
        found += [file for file in files if is_file(file)]
    return sorted(found)


def _ending(name: str) -> str:
    """Return what kind of text a file holds: its last suffix, in small letters, but for .zst."""
    return pathlib.PurePath(name.lower().removesuffix(_PACKED)).suffix


def _read_file(path: pathlib.Path) -> Iterator[str]:
    with reading(path):
        if _ending(path.name) == ".json":
            yield from _json_file(path)
            return
        with _open(path) as file:
            if _ending(path.name) in _LINES:
                yield from _json_texts(file, path)
            else:
                yield _plain_text(file)


def _open(path: pathlib.Path) -> io.TextIOWrapper:
    packed = path.name.lower().endswith(_PACKED)
    raw = io.BufferedReader(ZstdReader(path)) if packed else path.open("rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig")


def _plain_text(file: io.TextIOWrapper) -> str:
    """Read a text, decoded in one piece: a text that is put together exists twice meanwhile."""
    raw = cast(IO[bytes], file.buffer)
    content, missing = bytearray(), _MAX_CHARACTERS
    while missing and (piece := raw.read(min(missing, _PIECE))):
        missing -= len(piece.translate(None, _CONTINUING))
        content += piece
    rest = raw.read(3)  # of the last character
    content += rest[: len(rest) - len(rest.lstrip(_CONTINUING))]
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\r" in content:  # line ends as Python's text mode reads them
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content.decode("utf-8")


def _json_file(path: pathlib.Path) -> Iterator[str]:
    """Yield the texts of a list, of lines, or of one object."""
    with _open(path) as file:
        while (begin := file.read(_PIECE)).isspace():
            yield begin
        if begin.lstrip().startswith("["):
            records = parse_list(begin, file, shown(path), longest=_LONGEST_LINE)
            for number, record in enumerate(records):
                yield _text_or_text_of(record, f"{shown(path)}, entry {number}")
            return
    with _open(path) as file:
        while (line := file.readline(_LONGEST_LINE + 1)).isspace():
            pass
        lines = _is_object(line)
        text = "" if lines else line + file.read(_LONGEST_LINE + 1 - len(line))
    if lines:
        with _open(path) as file:
            yield from _json_texts(file, path)
    elif len(text) > _LONGEST_LINE:
        raise InputError(
            f"{shown(path)} has more than {_LONGEST_LINE:,} characters; make it JSON lines (.jsonl)"
        )
    else:
        yield _text_or_text_of(parse_json(text, shown(path)), shown(path))


def _text_or_text_of(record: Any, where: str) -> str:
    return _as_text(record) if isinstance(record, str) else _text_of(record, where)


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text, ""), dict)
    except InputError:
        return False


def _json_texts(lines: io.TextIOBase, path: pathlib.Path) -> Iterator[str]:
    for number in itertools.count(1):
        line = lines.readline(_LONGEST_LINE + 1).removeprefix("\ufeff")  # files joined by cat
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            place = f"{shown(path)}, line {number}"
            raise InputError(f"{place} has more than {_LONGEST_LINE:,} characters")
        if line.isspace():
            yield ""
            continue
        place = f"{shown(path)}, line {number}"
        yield _text_of(parse_json(line, place), place)


def _text_of(record, where: str) -> str:
    if isinstance(record, dict):
        for key in _TEXT_KEYS:
            if isinstance(record.get(key), str):
                return _as_text(record[key])
    raise InputError(f"{where}: no text under any of {', '.join(_TEXT_KEYS)}")


def _as_text(text: str) -> str:
    """Replace halves of surrogate pairs, which are legal JSON, but no text."""
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_dataset(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"no such file or folder: {name}; to read it as a Hugging Face data set, "
            "pip install 'duo_jax[datasets]'"
        ) from None
    try:
        records = datasets.load_dataset(name, split="train", streaming=True)
        for record in records:
            yield _text_of(record, f"data set {name}")
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds, all about this name
        raise InputError(f"data set {name} cannot be read: {error}") from None
