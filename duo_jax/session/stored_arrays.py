"""Arrays of a saved cache: a safetensors file whose names, types and shapes are known beforehand.

So nothing of a file is believed: a header that is not the expected one is refused before anything
large is read, the whole file has a checksum that is kept elsewhere, and numbers must be finite.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duo_jax import files
from duo_jax.checkpoints.tensor_info import DTYPES
from duo_jax.errors import InputError
from duo_jax.schema import checksums
from duo_jax.schema.json_reader import parse_json

# Shape and type by name. None as a size: any; as a type: any that logits may have.
Expected = Mapping[str, tuple[tuple[int | None, ...], np.dtype | None]]

_DTYPES = DTYPES | {"I32": np.dtype(np.int32), "U32": np.dtype(np.uint32)}
_HEADER_BYTES = 1024  # per array; they take about 100
# Infinity's bits in the types of 2 bytes, which numpy is slow to look at.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}
_BLOCK = 1 << 18  # values looked at together, so that they stay in a processor's cache


class StoredArrays:
    """A file, of which only the header has been read.

    Args:
      path: the file.
      expected: what it must hold.

    Raises:
      InputError: it cannot be read, or holds other arrays.
    """

    def __init__(self, path: pathlib.Path, expected: Expected) -> None:
        self._path = path
        with files.reading(path), files.open_binary(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _HEADER_BYTES * (len(expected) + 1):
                raise _damaged(path, f"a header of {length:,} bytes")
            try:
                with safe_open(path, framework="np"):  # offsets and sizes fit the file's
                    self._header = parse_json(file.read(length).decode(), str(path))
            except SafetensorError as error:
                raise _damaged(path, str(error)) from None
        self._start = 8 + length
        found = {name: _described(entry) for name, entry in self._header.items()}
        for name in {**expected, **found}:
            if not _fits(found.get(name), expected.get(name)):
                raise _damaged(path, f"{name} is {found.get(name, 'missing')}")

    def read(self, checksum: str) -> dict[str, np.ndarray]:
        """Return the arrays as views of the mapped file.

        Raises:
          InputError: the file has another checksum, or a number is not finite.
        """
        with files.reading(self._path):
            content = np.asarray(np.memmap(self._path, np.uint8, mode="r"))
        if checksums.of_bytes(content) != checksum:
            raise _damaged(self._path, "its checksum is another")
        arrays = {}
        for name, entry in self._header.items():
            start, end = entry["data_offsets"]
            data = content[self._start + start : self._start + end]
            arrays[name] = data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if not all_finite(arrays[name]):
                raise _damaged(self._path, f"{name} holds NaN or infinity")
        return arrays


def save(arrays: Mapping[str, np.ndarray], path: pathlib.Path) -> str:
    """Write arrays, and return the checksum of the file.

    Raises:
      InputError: a number is not finite.
    """
    for name, array in arrays.items():
        if not all_finite(array):
            raise InputError(
                f"{name} in the cache holds NaN or infinity, so it is not saved; if the model is "
                "float16 or bfloat16, try --dtype float32"
            )
    save_file(dict(arrays), path)
    return checksums.of_bytes(np.asarray(np.memmap(path, np.uint8, mode="r")))


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds no NaN and no infinity."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    values = array.reshape(-1)
    blocks = (values[first : first + _BLOCK] for first in range(0, values.size, _BLOCK))
    infinity = _INFINITY.get(array.dtype.name)
    if infinity is None:
        return all(np.isfinite(block).all() for block in blocks)
    # As signed numbers, positive ones come last; as unsigned ones, negative ones do.
    return all(
        block.view(np.int16).max() < infinity and block.view(np.uint16).max() < infinity + 0x8000
        for block in blocks
    )


def _described(entry: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    return entry.get("dtype", "no array"), tuple(entry.get("shape", ()))


def _fits(
    found: tuple[str, tuple[int, ...]] | None,
    expected: tuple[tuple[int | None, ...], np.dtype | None] | None,
) -> bool:
    if found is None or expected is None:
        return False
    shape, dtype = expected
    accepted = DTYPES.values() if dtype is None else [dtype]
    sizes = zip(found[1], shape, strict=False)
    return (
        _DTYPES.get(found[0]) in accepted
        and len(found[1]) == len(shape)
        and all(size == wanted or wanted is None for size, wanted in sizes)
    )


def _damaged(path: pathlib.Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged: {reason}")
