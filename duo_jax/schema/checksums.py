"""Checksums of what is written to be read again: xxh3 with 128 bits, as 32 hexadecimal digits.

They find damage, such as a flipped bit or a file that was cut; they are no protection against
people. xxhash, which Hugging Face's datasets use too, reads some 20 GB a second: checking costs
much less than reading.

A JSON object can carry its own checksum, which covers every byte before it:

    {"step": 1, "loss": 0.25, "checksum": "0123456789abcdef0123456789abcdef"}
"""

import json
import pathlib
import re
from typing import Any

import numpy as np
import xxhash

from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.schema import json_reader

KEY = "checksum"
_SEAL = re.compile(rb', "checksum": "([0-9a-f]{32})"\}\Z')
_BLOCK = 1 << 20  # bytes that are made contiguous at once


def of_bytes(content: bytes | np.ndarray) -> str:
    """Return the checksum of bytes."""
    return xxhash.xxh3_128_hexdigest(content if isinstance(content, bytes) else content.data)


def of_array(array: np.ndarray) -> str:
    """Return the checksum of an array: its type, shape and values, whatever its order in memory."""
    digest = xxhash.xxh3_128(f"{array.dtype.name} {list(array.shape)}".encode())
    rows = max(1, _BLOCK // max(1, array[:1].nbytes)) if array.ndim else 1
    blocks = [array] if array.flags.c_contiguous else np.split(array, range(rows, len(array), rows))
    for block in blocks:
        if block.dtype.name == "int4":  # in a byte, of which only four bits mean something
            block = block.astype(np.int8)
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def seal(values: dict[str, Any]) -> str:
    """Return a JSON object in one line, with its checksum as the last key.

    Raises:
      ValueError: it is empty, has a checksum already, or holds NaN or infinity.
    """
    if not values or KEY in values:
        raise ValueError(f"{values} cannot be given a checksum")
    text = json.dumps(values, allow_nan=False)[:-1]
    return f'{text}, "{KEY}": "{of_bytes(text.encode())}"}}'


def is_sealed(text: bytes) -> bool:
    """Whether bytes are exactly what `seal` once returned; nothing is parsed."""
    found = _SEAL.search(text)
    return found is not None and of_bytes(text[: found.start()]) == found[1].decode()


def read_sealed(path: str | pathlib.Path) -> tuple[dict[str, Any], bool | None]:
    """Read a file that holds one JSON object and a line end.

    Returns:
      The object without its checksum, and whether that is right; None if it has none.

    Raises:
      InputError: as `duo_jax.schema.json_reader.read_json`.
    """
    text = files.read_text(path, max_bytes=json_reader.MAX_BYTES)
    values = json_reader.parse_json(text, files.shown(path))
    if not isinstance(values, dict):
        raise InputError(f"{files.shown(path)} holds no JSON object")
    right = text.endswith("\n") and is_sealed(text[:-1].encode()) if KEY in values else None
    return {key: value for key, value in values.items() if key != KEY}, right
