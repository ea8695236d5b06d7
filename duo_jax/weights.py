"""The tensors of a model folder, one at a time, in our layout."""

import pathlib
from typing import Protocol

import numpy as np

from duo_jax import tensor_names
from duo_jax.config import ModelConfig, read_config
from duo_jax.errors import InputError
from duo_jax.safetensors_files import DTYPES, SafetensorsFiles, TensorInfo, shortened
from duo_jax.tensor_names import Tensor


class Files(Protocol):
    """Weight files: what they hold, by Hugging Face name, and a way to read one tensor."""

    info: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray: ...


class HuggingFaceWeights:
    """Tensors from files in Hugging Face's layout.

    Args:
      files: the files, opened.
      config: the model that they should hold.
      where: what to call them in messages.

    Raises:
      InputError: tensors are missing, unknown, or of another shape or type than config.json
        implies; all are listed.
    """

    def __init__(self, files: Files, config: ModelConfig, where: str) -> None:
        self.config = config
        self.tensors = tensor_names.tensors(config)
        self._files = files
        _check(files.info, config, where)

    def dtype(self, tensor: Tensor) -> np.dtype:
        """Return the type a tensor is stored in."""
        dtype = self._files.info[tensor.name].dtype
        assert dtype is not None  # _check saw to it
        return dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        """Read one tensor, in our layout (not necessarily contiguous)."""
        return tensor.from_hf(self._files.read(tensor.name))

    def read_into(self, out: np.ndarray, tensor: Tensor) -> None:
        """Read one tensor into an array of `tensor.shape`, casting to its type."""
        out[...] = cast(self.read(tensor), out.dtype, tensor.name)


def open_weights(folder: pathlib.Path) -> HuggingFaceWeights:
    """Open a model's weights; reads headers only.

    To walk a model layer by layer: `weights.tensors` is ordered (embedding, layer 0, layer 1, ...,
    final norm, output projection), each with its `path`, `layer` and `shape`, and
    `weights.read(tensor)` returns that one tensor.

    Raises:
      InputError: files are missing or damaged, or tensors do not fit config.json.
    """
    config = read_config(folder)
    return HuggingFaceWeights(SafetensorsFiles(folder), config, str(folder))


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast weights (round to nearest even); bits stay as they are if the type does.

    Raises:
      InputError: a finite value is beyond the range of `dtype`.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and np.isinf(result).sum() > np.isinf(array).sum():
        raise InputError(f"{name} has values beyond the range of float16; use bfloat16 or float32")
    return result


def _check(info: dict[str, TensorInfo], config: ModelConfig, where: str) -> None:
    expected = {tensor.name: tensor.hf_shape for tensor in tensor_names.tensors(config)}
    missing = [name for name in expected if name not in info]
    extra = [
        name for name in info if name not in expected and not tensor_names.is_ignored(name, config)
    ]
    shape = [
        f"{name} is {list(info[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in info and info[name].shape != shape
    ]
    dtype = [
        f"{name} is {info[name].dtype_name}"
        for name in expected
        if name in info and info[name].dtype is None
    ]
    problems = [
        f"{len(found)} {kind}: {shortened(found)}"
        for kind, found in (
            ("missing", missing),
            ("unknown", extra),
            ("of another shape", shape),
            (f"of another type than {', '.join(DTYPES)}", dtype),
        )
        if found
    ]
    if problems:
        raise InputError(f"{where}: tensors do not fit config.json; {'; '.join(problems)}")
