"""The header of a GGUF file, checked: counts, lengths, types and places of tensors.

Nothing of the file is believed: every length is compared with what is left of the file before
anything is read, counts have bounds, and tensors must lie in the file without sharing bytes. So the
work is at most a fixed multiple of the file's size.
"""

import dataclasses
import functools
import mmap
import pathlib
import struct
import time
from typing import Any

import numpy as np

from duo_jax.errors import InputError, quoted
from duo_jax.files import is_file, reading, shown

MAGIC = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"
_VERSIONS = (2, 3)  # alike; version 1 had shorter counts
# Far above any model's: Gemma 3 has 262,144 tokens and 514,906 merges in a header of 15 MB.
_MAX_HEADER = 32 << 20  # bytes
_MAX_ENTRIES = 4_096
_MAX_TENSORS = 65_536
_MAX_TEXTS = 1 << 20  # in all lists together
_MAX_NAME = 256  # bytes
_MAX_DIMENSIONS = 4  # as in ggml
_MAX_ALIGNMENT = 1 << 20
# Seconds. Clocks of file systems tick: a file changed later than this may be changed again without
# another time, so what was read of it is not kept.
_SETTLED = 2.0

# Types of metadata, by their numbers.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _TEXT, _LIST = 7, 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies, and how."""

    shape: tuple[int, ...]  # slowest axis first, as in numpy
    type: Any  # a gguf.GGMLQuantizationType
    start: int  # in the file
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says about itself; lists of numbers are numpy arrays. Not to be changed."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def value(self, name: str, default: Any = None) -> Any:
        """Return an entry that is one value.

        Raises:
          InputError: it is a list.
        """
        found = self.metadata.get(name, default)
        if isinstance(found, list | np.ndarray):
            raise self.refused(f"{name} is a list of {len(found):,}; one value is needed")
        return found

    def refused(self, reason: str) -> InputError:
        """Return the error that says why the file is not used."""
        return InputError(f"{shown(self.path)} cannot be used: {reason}")


def library() -> Any:
    """Return the gguf package.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            "reading GGUF files needs the gguf package: pip install 'duo_jax[gguf]'"
        ) from None
    return gguf


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a path names a file that is GGUF, or says so by its name.

    Raises:
      InputError: the file cannot be read.
    """
    if not is_file(path):
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with reading(path), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def refuse_folder(folder: pathlib.Path) -> None:
    """Refuse a folder that is no model but holds some in GGUF, which have to be named themselves.

    Raises:
      InputError: it is one.
    """
    if not is_file(folder / "config.json"):
        for file in sorted(folder.glob("*.gguf")):
            raise InputError(f"{shown(folder)} holds GGUF files: name one, such as {shown(file)}")


def read_header(path: pathlib.Path) -> Header:
    """Read a file's metadata and the places of its tensors, once for as long as it is the same.

    Loading a model asks for them four times: for config, tokenizer, chat template and weights.

    Raises:
      InputError: the gguf package is missing, or the file is not GGUF, of another version, damaged
        or one of several parts.
    """
    library()
    with reading(path):
        stat = path.stat()
    if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED:
        return _read(path)
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _read_once(path, identity)


@functools.lru_cache(maxsize=1)
def _read_once(path: pathlib.Path, _identity: tuple[int, ...]) -> Header:
    """Read it; one of the same identity is returned as it was read."""
    return _read(path)


def _read(path: pathlib.Path) -> Header:
    with reading(path), path.open("rb") as file:
        begin = file.read(len(_LFS_POINTER))
        if begin == _LFS_POINTER:
            raise InputError(
                f"{shown(path)} is a git-lfs pointer instead of a model; run git lfs pull"
            )
        if not begin.startswith(MAGIC):
            raise InputError(f"{shown(path)} is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header()


class _Reader:
    """Reads the header from its first byte to its last."""

    def __init__(self, path: pathlib.Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._end = min(self._size, _MAX_HEADER)
        self._at = len(MAGIC)
        self._texts_left = _MAX_TEXTS

    def header(self) -> Header:
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            reason = "big-endian" if swapped in _VERSIONS else f"of version {version:,}"
            raise self._damaged(f"it is {reason}; versions 2 and 3, little-endian, are read")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        if num_tensors > _MAX_TENSORS or num_entries > _MAX_ENTRIES:
            raise self._damaged(
                f"it counts {num_tensors:,} tensors and {num_entries:,} entries, above "
                f"{_MAX_TENSORS:,} and {_MAX_ENTRIES:,}"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            name = self._name()
            if name in metadata:
                raise self._damaged(f"{quoted(name)} is in its metadata twice")
            metadata[name] = self._value(name)
        header = Header(path=self._path, metadata=metadata, tensors={})
        self._refuse_parts(header)
        return dataclasses.replace(header, tensors=self._tensors(header, num_tensors))

    def _refuse_parts(self, header: Header) -> None:
        count = header.value("split.count", 1)
        if count not in (0, 1):
            raise self._damaged(
                f"it is one of {quoted(count)} parts of a model; put them together with "
                "llama-gguf-split --merge"
            )

    def _tensors(self, header: Header, count: int) -> dict[str, StoredTensor]:
        alignment = header.value("general.alignment", 32)
        allowed = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT
        if not allowed or alignment & (alignment - 1):
            raise self._damaged(f"its alignment {quoted(alignment)} is no power of two")
        found = [self._tensor_info() for _ in range(count)]
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in found:
            if name in tensors:
                raise self._damaged(f"tensor {quoted(name)} is there twice")
            tensors[name] = dataclasses.replace(tensor, start=data + tensor.start)
        before, end = "the header", data
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self._damaged(f"tensor {quoted(name)} shares bytes with {before}")
            before, end = f"tensor {quoted(name)}", tensor.start + tensor.num_bytes
            if end > self._size:
                raise self._damaged(
                    f"{before} ends at byte {end:,} of {self._size:,}; was the download complete?"
                )
        return tensors

    def _tensor_info(self) -> tuple[str, StoredTensor]:
        """Read one tensor's name, shape, type and its offset in the data."""
        gguf, name = library(), self._name()
        num_axes = self._number("I")
        if not 0 < num_axes <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {quoted(name)} has {num_axes:,} dimensions")
        shape = tuple(self._number("Q") for _ in range(num_axes))[::-1]
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._damaged(f"tensor {quoted(name)} has the unknown type {number:,}") from None
        size = 1
        for axis in shape:
            size *= axis
        if not 0 < size <= self._size * 16 or shape[-1] % block:  # 16: no type has half a bit
            raise self._damaged(f"tensor {quoted(name)} of type {kind.name} has shape {shape}")
        return name, StoredTensor(
            shape=shape, type=kind, start=offset, num_bytes=size // block * block_bytes
        )

    def _value(self, name: str) -> Any:
        kind = self._number("I")
        if kind == _LIST:
            return self._list(name)
        if kind == _TEXT:
            return self._text(name, self._end)
        if kind == _BOOL:
            return self._number("B") != 0
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        raise self._damaged(f"{quoted(name)} has the unknown type {kind:,}")

    def _list(self, name: str) -> list[str] | np.ndarray:
        kind, count = self._number("I"), self._number("Q")
        if kind == _TEXT:
            if count > self._texts_left:
                raise self._damaged(f"{quoted(name)} brings more than {_MAX_TEXTS:,} texts")
            self._texts_left -= count
            return [self._text(name, self._end) for _ in range(count)]
        code = "B" if kind == _BOOL else _SCALARS.get(kind)
        if code is None:
            raise self._damaged(f"{quoted(name)} is a list of the unknown type {kind:,}")
        dtype = np.dtype(f"<{code}")
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._content, dtype, count, start).copy()

    def _name(self) -> str:
        return self._text("a name", _MAX_NAME)

    def _text(self, name: str, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._damaged(f"{quoted(name)} has {length:,} bytes, above {longest:,}")
        start = self._advance(length)
        try:
            return self._content[start : self._at].decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{quoted(name)} is not UTF-8") from None

    def _number(self, code: str) -> Any:
        kind = _STRUCTS[code]
        return kind.unpack_from(self._content, self._advance(kind.size))[0]

    def _advance(self, num_bytes: int) -> int:
        """Go past some bytes; return where they start."""
        start = self._at
        if start + num_bytes > self._end:
            if self._end < self._size:
                raise self._damaged(f"its header has more than {_MAX_HEADER:,} bytes")
            raise self._damaged("it ends within its header; was the download complete?")
        self._at = start + num_bytes
        return start

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{shown(self._path)} cannot be read: {reason}")


_STRUCTS = {code: struct.Struct(f"<{code}") for code in _SCALARS.values()}
