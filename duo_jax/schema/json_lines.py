"""Files of one JSON object per line, written line by line; each line has its own checksum.

A line that is damaged costs that line only: it is set aside into a file of its own, with a word on
stderr, and the rest is read. Lines without a checksum, of earlier versions, are read where they
hold exactly what they may hold.
"""

import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar

from duo_jax import files
from duo_jax.errors import InputError, cut
from duo_jax.schema import checksums
from duo_jax.schema.json_reader import parse_json

_MAX_BYTES = 1 << 20  # of a line; the longest of ours have some kB
_CHUNK = 1 << 20

Record = TypeVar("Record")


def append(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Add a line.

    Raises:
      InputError: it cannot be written.
      ValueError: it could not be read again: it is too long, or holds NaN or infinity.
    """
    files.append_text(path, _line(values))


def write(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write the whole file under a temporary name, then rename it; errors are those of `append`."""
    files.write_text(path, "".join(map(_line, lines)))


def read(
    path: pathlib.Path, check: Callable[[dict[str, Any], str], Record], *, lost: str
) -> list[Record]:
    """Read the lines that are not damaged; set the others aside, in NAME.damaged.jsonl.

    Args:
      path: the file; need not exist.
      check: is given an object without its checksum, and its place for messages; returns what
        becomes of it, or raises an InputError where it holds something else than it may.
      lost: what follows from a loss, for the line on stderr.

    Raises:
      InputError: the file cannot be read, or damaged lines cannot be set aside.
    """
    if not files.exists(path):
        return []
    whole, records, damaged, first, lines_lost = [], [], [], "", 0
    with files.reading(path), files.open_binary(path) as file:
        for number, (start, line) in enumerate(_lines(file), start=1):
            try:
                values = _parse(line, f"line {number}")
                records.append(check(values, f"line {number}"))
                whole.append(values)
            except InputError as error:
                first, lines_lost = first or cut(str(error), 200), lines_lost + 1
                if damaged and damaged[-1][1] == start:  # they are copied in one piece
                    start = damaged.pop()[0]
                damaged.append((start, file.tell()))
    if damaged:
        aside = path.with_suffix(".damaged.jsonl")
        _copy(path, damaged, aside)
        write(path, whole)
        more = f" and {lines_lost - 1:,} more" if lines_lost > 1 else ""
        print(f"{path}: {first}{more}: set aside in {aside.name}; {lost}", file=sys.stderr)
    return records


def _line(values: dict[str, Any]) -> str:
    line = checksums.seal(values) + "\n"
    if len(line) > _MAX_BYTES:
        raise ValueError(f"a line of {len(line):,} bytes is longer than {_MAX_BYTES:,}")
    return line


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield where each line begins, and the line; of a line that is too long, only its beginning.

    When a line is yielded, the file's position is its end.
    """
    start = 0
    while line := file.readline(_MAX_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(_CHUNK)):
            pass
        yield start, line
        start = file.tell()


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > _MAX_BYTES:
        raise InputError(f"{where} is longer than {_MAX_BYTES:,} bytes")
    if not line.endswith(b"\n"):
        raise InputError(f"{where} was cut short")
    sealed = checksums.is_sealed(line[:-1])
    try:
        values = parse_json(line.decode(), where)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8 text") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} holds no JSON object")
    if checksums.KEY in values and not sealed:
        raise InputError(f"{where} is damaged: its checksum is another")
    return {key: value for key, value in values.items() if key != checksums.KEY}


def _copy(path: pathlib.Path, places: list[tuple[int, int]], aside: pathlib.Path) -> None:
    """Append parts of a file to another."""
    files.check_file(aside)
    with files.writing(aside), path.open("rb") as source, aside.open("ab") as target:
        for start, end in places:
            source.seek(start)
            for at in range(start, end, _CHUNK):
                target.write(chunk := source.read(min(_CHUNK, end - at)))
            if not chunk.endswith(b"\n"):
                target.write(b"\n")
