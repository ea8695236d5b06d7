"""Legacy weights: PyTorch pickles (pytorch_model.bin, single or sharded).

Pickles can run code when they are opened. So they are read only if the user asks for it, and with
weights_only=True, which refuses everything but tensors. Files are memory-mapped: a tensor is read
when it is used.
"""

import pathlib

import ml_dtypes
import numpy as np

from duo_jax.checkpoints.safetensors_files import read_index
from duo_jax.checkpoints.tensor_info import DTYPES, TensorInfo
from duo_jax.errors import InputError
from duo_jax.files import present

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"


class PickledFiles:
    """All tensors of `folder`, by their names in the files.

    Raises:
      InputError: there are no such files, one is missing or cannot be read, or torch is missing.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        if present(folder / SINGLE_FILE):
            paths = [folder / SINGLE_FILE]
        elif present(folder / INDEX_FILE):
            paths, _ = read_index(folder / INDEX_FILE)
        else:
            raise InputError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        self._tensors = {}
        for path in paths:
            self._tensors |= _load(path)
        self.info: dict[str, TensorInfo] = {}
        for name, tensor in self._tensors.items():
            dtype_name = str(tensor.dtype).removeprefix("torch.")
            known = {dtype.name: dtype for dtype in DTYPES.values()}
            self.info[name] = TensorInfo(
                shape=tuple(tensor.shape), dtype_name=dtype_name, dtype=known.get(dtype_name)
            )

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as a view of its file."""
        tensor = self._tensors[name].detach()
        if self.info[name].dtype_name == "bfloat16":  # numpy on torch's side does not know it
            import torch

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _load(path: pathlib.Path) -> dict:
    try:
        import torch
    except ImportError:
        raise InputError(
            "reading pickled weights needs PyTorch: pip install 'duo_jax[pickle]'"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and file errors have no common class
        raise InputError(
            f"{path} cannot be read as pickled weights ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no details'})"
        ) from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise InputError(f"{path} holds something else than named tensors")
    return tensors
