"""Write a model's parameters as Hugging Face safetensors, one tensor at a time.

The safetensors library needs all tensors of a file in memory. So files are written here, as the
format defines them: 8 bytes of header length N (little-endian), N bytes of JSON with the type,
shape and offsets of each tensor, then the tensors' bytes.
"""

import json
import pathlib
from collections.abc import Callable

import huggingface_hub
import numpy as np

from duo_jax.checkpoints.safetensors_files import INDEX_FILE
from duo_jax.checkpoints.tensor_info import DTYPES, cast
from duo_jax.checkpoints.tensor_names import Tensor
from duo_jax.checkpoints.weights import WeightFiles, read_array

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_params(
    folder: pathlib.Path,
    weight_files: WeightFiles,
    *,
    dtype: np.dtype | None,
    max_shard_size: int,
    progress: Callable[[int], object],
) -> None:
    """Write model.safetensors, or shards and their index if it would be too large.

    Args:
      folder: where; must exist.
      weight_files: where tensors come from.
      dtype: type to cast to; None keeps each tensor's own.
      max_shard_size: largest file, in bytes of tensors; a larger tensor gets a file of its own.
      progress: called with the number of bytes read after each tensor.

    Raises:
      InputError: a tensor cannot be read or cast.
    """
    tensors = {tensor.name: tensor for tensor in weight_files.tensors}
    sizes = {
        name: (dtype or weight_files.dtype(tensor)).itemsize * tensor.size
        for name, tensor in tensors.items()
    }
    # The library asks for tensors only to measure them.
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, names in shards.filename_to_tensors.items():
        shard = [tensors[name] for name in names]
        _write_file(folder / file_name, shard, weight_files, dtype, progress)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: pathlib.Path,
    tensors: list[Tensor],
    weight_files: WeightFiles,
    dtype: np.dtype | None,
    progress: Callable[[int], object],
) -> None:
    def stored(tensor: Tensor) -> np.dtype:
        return dtype or weight_files.dtype(tensor)

    # Wide types first, as the library does, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: (-stored(tensor).itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in tensors:
        start, end = end, end + stored(tensor).itemsize * tensor.size
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[stored(tensor)],
            "shape": tensor.hf_shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            array = tensor.to_hf(
                cast(read_array(weight_files, tensor), stored(tensor), tensor.name)
            )
            file.write(array.reshape(-1).view(np.uint8).data)
            progress(weight_files.dtype(tensor).itemsize * tensor.size)
