"""Long text to hide passkeys in: files, folders, JSON lines, hub data sets, or Python's own manual.

The default needs no download: `pydoc_data.topics`, the language reference that every Python
installation carries (about 465 KB; it differs a little between Python versions).
"""

import codecs
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from duo_jax.errors import InputError
from duo_jax.files import is_file, is_folder, reading

# Enough for any haystack; reading on would only cost time and memory.
_MAX_CHARACTERS = 50_000_000
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".jsonl.zst")
_TEXT_KEYS = ("text", "content", "chapter", "document", "article")


def load_documents(sources: Sequence[str]) -> list[str]:
    """Read documents in a fixed order.

    Args:
      sources: text files, folders (searched for .txt, .md, .rst, .jsonl and .jsonl.zst), or names
        of Hugging Face data sets (needs the extra `datasets`). JSON lines hold their text under
        "text", "content", "chapter", "document" or "article". Empty: the built-in text.

    Returns:
      Non-empty documents, at most 50 million characters in all.

    Raises:
      InputError: a source does not exist, cannot be read or holds no text.
    """
    if not sources:
        return _built_in()
    documents, characters = [], 0
    for document in itertools.chain.from_iterable(map(_read_source, sources)):
        if document.strip():
            documents.append(document[: _MAX_CHARACTERS - characters])
            characters += len(documents[-1])
        if characters >= _MAX_CHARACTERS:
            break
    if not documents:
        raise InputError(f"no text found in {', '.join(sources)}")
    return documents


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
        with reading(path):
            files = sorted(
                p for p in path.rglob("*") if p.name.endswith(_TEXT_SUFFIXES) and p.is_file()
            )
        if not files:
            raise InputError(f"{path} holds no {', '.join(_TEXT_SUFFIXES)} files")
        return itertools.chain.from_iterable(map(_read_file, files))
    if is_file(path):
        return _read_file(path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _read_dataset(source)
    raise InputError(f"no such text: {source} (a file, a folder or a data set's name is needed)")


def _read_file(path: pathlib.Path) -> Iterator[str]:
    with reading(path):
        if path.name.endswith(".jsonl"):
            with path.open(encoding="utf-8") as lines:
                yield from _json_texts(lines, path)
        elif path.name.endswith(".jsonl.zst"):
            yield from _json_texts(_zstd_lines(path), path)
        else:
            yield path.read_text(encoding="utf-8")


def _zstd_lines(path: pathlib.Path) -> Iterator[str]:
    """Yield the lines of all frames of a file; zstandard's own reader hides a cut-off end."""
    import zstandard

    frame = None

    def unpacked() -> Iterator[bytes]:
        nonlocal frame
        with path.open("rb") as packed:
            while data := packed.read(1 << 20):
                while data:
                    if frame is None or frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data

    rest = ""
    try:
        for decoded in codecs.iterdecode(unpacked(), "utf-8"):
            *lines, rest = (rest + decoded).split("\n")
            yield from lines
    except zstandard.ZstdError as error:
        raise InputError(f"{path} is not a zstd file: {error}") from None
    if frame is not None and not frame.eof:
        raise InputError(f"{path} is cut short: its last zstd frame has no end")
    yield rest


def _json_texts(lines: Iterable[str], path: pathlib.Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise InputError(f"{path}, line {number}: not JSON") from None
        yield _text_of(record, f"{path}, line {number}")


def _text_of(record, where: str) -> str:
    if isinstance(record, dict):
        for key in _TEXT_KEYS:
            if isinstance(record.get(key), str):
                # Half a surrogate pair is legal JSON, but no text.
                return record[key].encode("utf-8", "replace").decode("utf-8")
    raise InputError(f"{where}: no text under any of {', '.join(_TEXT_KEYS)}")


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
