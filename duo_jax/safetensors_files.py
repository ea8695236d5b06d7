"""The weights of a Hugging Face folder: safetensors files, opened lazily, without torch.

Opening reads only the headers. The files stay memory mapped; reading a tensor copies that tensor
and nothing else, so that host memory stays at about one tensor whatever the size of the model.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from duo_jax.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# safetensors' names of the types that weights may have.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a file says about one tensor, without reading it.

    `dtype` is None where the type is not one that weights may have; `dtype_name` names it.
    """

    shape: tuple[int, ...]
    dtype_name: str
    dtype: np.dtype | None


class SafetensorsFiles:
    """All tensors of `folder`, by their names in the files.

    Raises:
      InputError: there are no weights, a file is missing, or one cannot be read.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.info: dict[str, TensorInfo] = {}
        self._paths: dict[str, pathlib.Path] = {}
        self._open_files = {path: _open(path) for path in _weight_files(folder)}
        for path, file in self._open_files.items():
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                dtype_name = header.get_dtype()
                self.info[name] = TensorInfo(
                    shape=tuple(header.get_shape()),
                    dtype_name=dtype_name,
                    dtype=DTYPES.get(dtype_name),
                )
                self._paths[name] = path

    def read(self, name: str) -> np.ndarray:
        """Copy one tensor from its file."""
        path = self._paths[name]
        try:
            return self._open_files[path].get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path} cannot be read: {error}") from None


def has_safetensors(folder: pathlib.Path) -> bool:
    """Whether a folder holds safetensors weights under the names that transformers uses."""
    return (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()


def read_index(path: pathlib.Path) -> list[str]:
    """Return the names of the files that a sharded checkpoint's index lists, sorted.

    Raises:
      InputError: the index cannot be read, or names something that is not a file beside it.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if pathlib.PurePath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as an index of weight files ({type(error).__name__}: {error})"
        ) from None
    if outside:
        raise InputError(f"{path} names {outside[0]!r}, which is not a file beside it")
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise InputError(
            f"{path.parent} lacks {shortened(missing)}, listed in {path.name}; "
            "was the download complete?"
        )
    return names


def shortened(words: list[str], limit: int = 5) -> str:
    """Join a list for an error message: "a, b, c and 287 more"."""
    shown = ", ".join(words[:limit])
    return shown if len(words) <= limit else f"{shown} and {len(words) - limit} more"


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / SINGLE_FILE).exists():  # transformers prefers it too
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return [folder / name for name in read_index(folder / INDEX_FILE)]
    pickled = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
    if pickled:
        raise InputError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when "
            "opened; if you trust them: python -m convert --allow-pickle SRC DST"
        )
    raise InputError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _open(path: pathlib.Path):
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise InputError(
                    f"{path} is a git-lfs pointer instead of weights; run git lfs pull"
                ) from None
        raise InputError(
            f"{path} is not a complete safetensors file ({error}); was the download complete?"
        ) from None
