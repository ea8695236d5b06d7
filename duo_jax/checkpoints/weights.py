"""The tensors of a model, one at a time, in our layout.

They are in a Hugging Face folder, a converted checkpoint or a GGUF file; `open_weights` finds out.
To walk a model layer by layer:

    weight_files = open_weights(folder)
    for tensor in weight_files.tensors:  # embedding, layer 0, layer 1, ..., final norm, lm_head
        array = weight_files.read(tensor)  # [*tensor.shape], belongs at tensor.path, tensor.layer
"""

import dataclasses
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np

from duo_jax.checkpoints import gguf, tensor_info, tensor_names
from duo_jax.checkpoints.folder_kinds import MERGE_LORA, refuse_what_is_no_model
from duo_jax.checkpoints.orbax_checkpoint import CheckpointFiles, is_checkpoint
from duo_jax.checkpoints.safetensors_files import SafetensorsFiles, has_safetensors
from duo_jax.checkpoints.tensor_info import TensorInfo
from duo_jax.checkpoints.tensor_names import Tensor
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.model.hf_config import read_config
from duo_jax.model.quantised_weights import QuantisedKernel, StoredFormat

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LORA = ".lora_"
_ROWS = 1024  # of the embedding that are compared at once


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

    With tied embeddings, files may hold the embedding under its own name, under that of the output
    projection, or both. Two that differ are not tied, whatever config.json says: `architecture` is
    the model that the files hold (transformers reads them so since version 5).

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
        untied = tensor_names.tensors(dataclasses.replace(architecture, tie_embeddings=False))
        expected = {tensor.name: tensor.hf_shape for tensor in untied}
        self._names = tensor_names.in_file(files.info, expected)
        self._files = files
        info = {ours: files.info[theirs] for ours, theirs in self._names.items()}
        if any(_LORA in name for name in info):
            raise InputError(f"{where} holds the matrices of a LoRA; {MERGE_LORA}")
        if architecture.tie_embeddings:
            if _HEAD in info and _EMBEDDING not in info:
                self._names[_EMBEDDING], info[_EMBEDDING] = self._names.pop(_HEAD), info.pop(_HEAD)
            if _HEAD not in info:
                del expected[_HEAD]
        tensor_info.check(
            info, expected, where=where, config=config, ignored=tensor_names.is_buffer
        )
        tied = architecture.tie_embeddings and (_HEAD not in info or self._equal(_HEAD, _EMBEDDING))
        self.architecture = dataclasses.replace(architecture, tie_embeddings=tied)
        self.tensors = tensor_names.tensors(self.architecture)

    def dtype(self, tensor: Tensor) -> np.dtype:
        dtype = self._files.info[self._names[tensor.name]].dtype
        assert dtype is not None, f"{tensor.name} passed the check"
        return dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        return tensor.from_hf(self._read(tensor.name))

    def _read(self, name: str) -> np.ndarray:
        return self._files.read(self._names[name])

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, whatever their types."""
        one_, other_ = self._read(one), self._read(other)
        blocks = (slice(start, start + _ROWS) for start in range(0, len(one_), _ROWS))
        return all(
            np.array_equal(one_[rows].astype(np.float32), other_[rows].astype(np.float32))
            for rows in blocks
        )


def read_array(weight_files: WeightFiles, tensor: Tensor) -> np.ndarray:
    """Read a tensor of files whose format is "model", in which nothing is quantised."""
    array = weight_files.read(tensor)
    assert isinstance(array, np.ndarray), f"{tensor.name} is stored quantised"
    return array


def load_architecture(folder: pathlib.Path) -> ModelConfig:
    """Read the architecture of a model: its config, and whether embeddings are tied in the files.

    Raises:
      InputError: as `open_weights`; a folder without weights needs only its config.json.
    """
    if gguf.is_gguf(folder):
        return gguf.read_config(folder)
    refuse_what_is_no_model(folder)
    architecture = read_config(folder)
    if not architecture.tie_embeddings or is_checkpoint(folder) or not has_safetensors(folder):
        return architecture
    return open_weights(folder).architecture


def has_weights(folder: pathlib.Path) -> bool:
    """Whether `open_weights` has something to open in a folder or file; nothing is checked."""
    return gguf.is_gguf(folder) or is_checkpoint(folder) or has_safetensors(folder)


def open_weights(folder: pathlib.Path) -> WeightFiles:
    """Open a model's weights; reads headers only, and embeddings that may be tied.

    Raises:
      InputError: files are missing or damaged, or tensors do not fit config.json.
    """
    if gguf.is_gguf(folder):
        tensors = gguf.GgufTensors(folder)
        return HuggingFaceFiles(tensors, tensors.architecture, str(folder), config="metadata")
    refuse_what_is_no_model(folder)
    architecture = read_config(folder)
    if is_checkpoint(folder):
        return CheckpointFiles(folder, architecture)
    return HuggingFaceFiles(SafetensorsFiles(folder), architecture, str(folder))
