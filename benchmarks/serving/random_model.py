"""A model of random weights as a Hugging Face folder, so that every library loads the same ones.

Weights are a pure function of (seed, tensor name), normal with 1/sqrt(fan_in); norms are 1.
"""

import hashlib
import json
import math
import pathlib
import zlib

import numpy as np
from tqdm import tqdm

from convert.huggingface_writer import write_params
from duo_jax import files
from duo_jax.checkpoints import tensor_names
from duo_jax.checkpoints.tensor_info import DTYPES
from duo_jax.checkpoints.tensor_names import Tensor
from duo_jax.model.config import ModelConfig
from duo_jax.model.hf_config import to_hf
from duo_jax.model.quantised_weights import StoredFormat

_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}
_SHARD_SIZE = 10**12  # one file


class RandomWeights:
    """Tensors drawn when they are read (a duo_jax.checkpoints.weights.WeightFiles)."""

    format: StoredFormat = "model"

    def __init__(self, architecture: ModelConfig, dtype: str, seed: int) -> None:
        self.architecture = architecture
        self.tensors = tensor_names.tensors(architecture)
        self._dtype, self._seed = _DTYPES[dtype], seed

    def dtype(self, tensor: Tensor) -> np.dtype:
        del tensor
        return self._dtype

    def read(self, tensor: Tensor) -> np.ndarray:
        if tensor.path[-1] == "scale":
            return np.ones(tensor.shape, self._dtype)
        rng = np.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])
        fan_in = tensor.hf_shape[1]
        # Drawn in the file's layout, so that writing copies whole rows.
        values = rng.standard_normal(tensor.hf_shape, np.float32)
        values *= 1 / math.sqrt(fan_in)
        return tensor.from_hf(values.astype(self._dtype, copy=False))


def ensure_folder(
    config: ModelConfig, cache: pathlib.Path, *, dtype: str = "float32", seed: int = 0
) -> pathlib.Path:
    """Return the model's folder in `cache`; write it first if it is not there.

    Args:
      config: a Llama.
      cache: where such folders are kept; each is named after all that determines its content.
      dtype: of the weights.
      seed: of the random draws.

    Raises:
      InputError: the folder cannot be written.
    """
    raw = to_hf(config) | {"dtype": dtype, "bos_token_id": 0, "eos_token_id": 1}
    identity = hashlib.sha256(json.dumps([raw, seed]).encode()).hexdigest()[:12]
    folder = cache / f"random-{identity}"
    if folder.is_dir():
        return folder
    weights = RandomWeights(config, dtype, seed)
    size = weights.dtype(weights.tensors[0]).itemsize * sum(t.size for t in weights.tensors)
    with (
        files.new_folder(folder) as partial,
        tqdm(total=size, desc="random weights", unit="B", unit_scale=True, disable=None) as bar,
    ):
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        write_params(partial, weights, dtype=None, max_shard_size=_SHARD_SIZE, progress=bar.update)
    return folder
