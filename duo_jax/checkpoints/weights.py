"""The tensors of a model, one at a time, in our layout.

They are in a Hugging Face folder, a converted checkpoint or a GGUF file; `open_weights` finds out.
To walk a model layer by layer:

    weight_files = open_weights(folder)
    for tensor in weight_files.tensors:  # embedding, layer 0, layer 1, ..., final norm, lm_head
        array = weight_files.read(tensor)  # [*tensor.shape], belongs at tensor.path, tensor.layer
"""

import pathlib
from typing import Protocol, runtime_checkable

import numpy as np

from duo_jax.checkpoints import gguf, tensor_info, tensor_names
from duo_jax.checkpoints.orbax_checkpoint import CheckpointFiles, is_checkpoint
from duo_jax.checkpoints.safetensors_files import SafetensorsFiles
from duo_jax.checkpoints.tensor_info import TensorInfo
from duo_jax.checkpoints.tensor_names import Tensor
from duo_jax.model.config import ModelConfig
from duo_jax.model.hf_config import read_config
from duo_jax.model.quantised_weights import QuantisedKernel, StoredFormat


@runtime_checkable
class WeightFiles(Protocol):
    """The files that hold a model's weights, opened; each tensor is read when it is needed."""

    architecture: ModelConfig
    tensors: tuple[Tensor, ...]
    format: StoredFormat  # of the layers' projections

    def dtype(self, tensor: Tensor) -> np.dtype:
        """Return the type that a tensor is stored in; for a quantised one, that of its values."""
        ...

    def read(self, tensor: Tensor) -> np.ndarray | QuantisedKernel:
        """Read one tensor, in our layout; possibly a read-only, strided view of a file."""
        ...


@runtime_checkable
class NamedTensors(Protocol):
    """Tensors in Hugging Face's layout, by their names in the files."""

    info: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, as it is in the file."""
        ...


class HuggingFaceFiles:
    """Tensors from files in Hugging Face's layout.

    Args:
      files: the files, opened.
      architecture: the model that they should hold.
      where: the name of the files in error messages.
      config: what says which tensors there should be, in error messages.

    Raises:
      InputError: tensors are missing, unknown, or of another shape or type than config.json
        implies; all are counted in one line.
    """

    format: StoredFormat = "model"

    def __init__(
        self,
        files: NamedTensors,
        architecture: ModelConfig,
        where: str,
        *,
        config: str = "config.json",
    ) -> None:
        self.architecture = architecture
        self.tensors = tensor_names.tensors(architecture)
        self._files = files
        tensor_info.check(
            files.info,
            {tensor.name: tensor.hf_shape for tensor in self.tensors},
            where=where,
            config=config,
            ignored=lambda name: tensor_names.is_ignored(name, architecture),
        )

    def dtype(self, tensor: Tensor) -> np.dtype:
        dtype = self._files.info[tensor.name].dtype
        assert dtype is not None, f"{tensor.name} passed the check"
        return dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        return tensor.from_hf(self._files.read(tensor.name))


def read_array(weight_files: WeightFiles, tensor: Tensor) -> np.ndarray:
    """Read a tensor of files whose format is "model", in which nothing is quantised."""
    array = weight_files.read(tensor)
    assert isinstance(array, np.ndarray), f"{tensor.name} is stored quantised"
    return array


def open_weights(folder: pathlib.Path) -> WeightFiles:
    """Open a model's weights; reads headers only.

    Raises:
      InputError: files are missing or damaged, or tensors do not fit config.json.
    """
    if gguf.is_gguf(folder):
        tensors = gguf.GgufTensors(folder)
        return HuggingFaceFiles(tensors, tensors.architecture, str(folder), config="metadata")
    architecture = read_config(folder)
    if is_checkpoint(folder):
        return CheckpointFiles(folder, architecture)
    return HuggingFaceFiles(SafetensorsFiles(folder), architecture, str(folder))
