"""The weights of a Hugging Face folder: safetensors files, opened lazily, without torch.

Opening reads only the headers; a tensor is a view of the memory-mapped file, and its bytes are read
when they are used. The safetensors library checks each file, but its readers copy every tensor,
which would double the host memory of loading. So the views are made here, from the same header:
8 bytes with its length N (little-endian), N bytes of JSON, then the data; the JSON gives the
offsets of each tensor.
"""

import pathlib

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from duo_jax import files
from duo_jax.checkpoints.tensor_info import DTYPES, TensorInfo, shortened
from duo_jax.errors import InputError, quoted
from duo_jax.files import exists
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER = 8 << 20  # bytes; Llama-3.1-405B has 150 KB in all its files


class SafetensorsFiles:
    """All tensors of `folder`, by their names in the files.

    Raises:
      InputError: there are no weights, a file is missing, or one cannot be read.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._data: dict[str, np.ndarray] = {}  # the raw bytes, mapped
        paths, listed = _weight_files(folder)
        for path in paths:
            header, data = _open(path)
            for name, entry in header.items():
                if name == "__metadata__" or listed.get(name, path.name) != path.name:
                    continue  # listed in another file, which counts
                if name in self.info:
                    raise InputError(f"{quoted(name)} is in two files of {folder}, and not listed")
                start, end = entry["data_offsets"]
                self._data[name] = data[start:end]
                self.info[name] = TensorInfo(
                    shape=tuple(entry["shape"]),
                    dtype_name=entry["dtype"],
                    dtype=DTYPES.get(entry["dtype"]),
                )

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as a read-only view of its file."""
        info = self.info[name]
        assert info.dtype is not None, f"{name} is {info.dtype_name}"
        return self._data[name].view(info.dtype).reshape(info.shape)


def has_safetensors(folder: pathlib.Path) -> bool:
    """Whether a folder holds safetensors weights under the names that transformers uses."""
    return exists(folder / SINGLE_FILE) or exists(folder / INDEX_FILE)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]  # file of each tensor


def read_index(path: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Return the files that a checkpoint's index lists, sorted, and the file of each tensor.

    Raises:
      InputError: the index cannot be read, or names something that is not a file beside it.
    """
    weight_map = convert(read_json(path), _Index, files.shown(path)).weight_map
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not name or pathlib.PurePath(name).name != name]
    if outside or not names:
        found = quoted(outside[0]) if outside else "none"
        raise InputError(f"{path} must name files beside it, not {found}")
    missing = [name for name in names if not files.is_file(path.parent / name)]
    if missing:
        raise InputError(
            f"{path.parent} lacks {shortened(missing)}, listed in {path.name}; "
            "was the download complete?"
        )
    return [path.parent / name for name in names], weight_map


def _weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    if exists(folder / SINGLE_FILE):  # transformers prefers it too
        return [folder / SINGLE_FILE], {}
    if exists(folder / INDEX_FILE):
        return read_index(folder / INDEX_FILE)
    pickled = sorted(folder.glob("pytorch_model*.bin*"))
    if pickled:
        raise InputError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when "
            "opened; if you trust them: python -m convert --allow-pickle SRC DST"
        )
    raise InputError(
        f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} (pickled .bin weights "
        "are read, and fetched from the hub, only by python -m convert --allow-pickle)"
    )


def _open(path: pathlib.Path) -> tuple[dict, np.ndarray]:
    """Check one file; return its header and its data as mapped bytes."""
    try:
        with files.open_binary(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if _MAX_HEADER < length <= path.stat().st_size - 8:
                raise InputError(f"{path} has a header of {length:,} bytes, above {_MAX_HEADER:,}")
            with safe_open(path, framework="np"):  # offsets, sizes and the file's length fit
                pass
            header = parse_json(file.read(length).decode(), files.shown(path))
        # A file of empty tensors has no bytes to map.
        rest = path.stat().st_size - 8 - length
        if rest == 0:
            return header, np.empty(0, np.uint8)
        return header, np.asarray(np.memmap(path, np.uint8, mode="r", offset=8 + length))
    except (SafetensorError, OSError) as error:
        raise InputError(_what_is_wrong(path, error)) from None


def _what_is_wrong(path: pathlib.Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                return f"{path} is a git-lfs pointer instead of weights; run git lfs pull"
    except OSError as unreadable:
        return f"{path} cannot be read: {unreadable.strerror}"
    return f"{path} is not a complete safetensors file ({error}); was the download complete?"
