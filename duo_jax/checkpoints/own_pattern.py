"""The pattern of a model for which nobody named one: its own, or one that ships with duo_jax.

A model's own pattern lies in the subfolder "pattern" of its folder. Patterns that ship lie in
duo_jax/patterns, with the presets they were made and measured with, and belong to published models,
which people keep under any name and in many formats. So a model is known by its weights, twice:

- a fingerprint: a digest of its shape, its rotary embedding and all its norms, which every format
  keeps as they are (GGUF files of any type, 8- and 4-bit checkpoints);
- a sketch of its projections, four numbers for each q_proj and v_proj: the sum of a quarter of the
  weights, each with a fixed random sign, over the root of their number. Rounding to 4 bits moves it
  by a tenth, as much as the weights; another model with the same norms has another sketch. What
  was trained a little further with frozen norms, as with a LoRA, passes if it moved them no more.
"""

import dataclasses
import importlib.resources
import json
import pathlib

import ml_dtypes
import numpy as np

from duo_jax import files
from duo_jax.checkpoints.weights import WeightFiles, has_weights, open_weights, read_array
from duo_jax.errors import InputError
from duo_jax.heads.pattern import load_pattern
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import QuantisedKernel, dequantise
from duo_jax.schema import checksums

OWN = "pattern"  # a folder in a model's folder
FINGERPRINT, SKETCH = "model_fingerprint", "model_sketch"  # in config.json of one that ships
_SKETCHED, _PARTS = ("q_proj", "v_proj"), 4
_MOST_MOVED = 0.25  # of a sketch, relative; 4-bit formats move it by .07 to .12
_SHAPE = (
    "vocab_size",
    "embed_size",
    "mlp_size",
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "head_dim",
)


def find_pattern(folder: pathlib.Path, architecture: ModelConfig) -> pathlib.Path:
    """Return the pattern folder of a model.

    Args:
      folder: the model's folder, or its GGUF file.
      architecture: the model.

    Raises:
      InputError: the model has none, and is not one whose pattern ships.
    """
    if files.is_folder(folder / OWN):
        return folder / OWN
    pattern = find_shipped(folder, architecture)
    if pattern is None:
        raise InputError(
            f"{folder} has no pattern of its own: name a pattern folder (python -m train.identify "
            'makes one), or "none" for the model as published'
        )
    return pattern


def fingerprint(weight_files: WeightFiles) -> str:
    """Return a digest of what every format of a model keeps: shape, rotary embedding, norms."""
    architecture = weight_files.architecture
    shape = [getattr(architecture, name) for name in _SHAPE]
    said = json.dumps([shape, dataclasses.asdict(architecture.rope)])
    # Published weights are bfloat16, or at least trained ones differ in it; a cast to another type
    # must not hide a model.
    norms = [
        read_array(weight_files, tensor).astype(ml_dtypes.bfloat16).tobytes()
        for tensor in weight_files.tensors
        if tensor.path[-1] == "scale"
    ]
    return checksums.of_bytes(b"".join([said.encode(), *norms]))


def sketch(weight_files: WeightFiles) -> list[float]:
    """Return the signed sums of a model's projections, in the order of its tensors."""
    sums = []
    for tensor in weight_files.tensors:
        if tensor.path[-1] == "kernel" and tensor.path[-2] in _SKETCHED:
            stored = weight_files.read(tensor)
            if isinstance(stored, QuantisedKernel):
                stored = dequantise(stored)
            weights = np.asarray(stored, np.float32).ravel()
            # numpy promises the same raw bits for ever, though not the same random numbers.
            words = np.random.Philox(key=0).random_raw(-(-weights.size // 64))
            minus = np.unpackbits(words.view(np.uint8), count=weights.size).astype(bool)
            signed = np.where(minus, -weights, weights)
            parts = np.array_split(signed, _PARTS)
            sums += [float(part.sum(dtype=np.float64)) / part.size**0.5 for part in parts]
    return sums


def ships(pattern: pathlib.Path) -> bool:
    """Whether a pattern folder is one that ships with duo_jax."""
    return pattern in shipped_patterns()


def shipped_patterns() -> list[pathlib.Path]:
    """Return the pattern folders that ship with duo_jax."""
    folder = pathlib.Path(str(importlib.resources.files("duo_jax") / "patterns"))
    return sorted(folder.iterdir()) if folder.is_dir() else []


def find_shipped(folder: pathlib.Path, architecture: ModelConfig) -> pathlib.Path | None:
    """Return the pattern folder that ships with duo_jax for a model, if one does."""
    gates = (architecture.num_layers, architecture.num_kv_heads)
    loaded = {path: load_pattern(path) for path in shipped_patterns()}
    fitting = {path: pattern for path, pattern in loaded.items() if pattern.gates.shape == gates}
    if not fitting or not has_weights(folder):
        return None
    weight_files = open_weights(folder)
    found = fingerprint(weight_files)
    for path, pattern in fitting.items():
        if pattern.extra[FINGERPRINT] == found:
            known = np.array(pattern.extra[SKETCH]).reshape(-1, len(_SKETCHED), _PARTS)
            moved = np.array(sketch(weight_files)).reshape(known.shape) - known
            lengths = np.linalg.norm([moved, known], axis=(1, 3))  # by projection
            if (lengths[0] <= _MOST_MOVED * lengths[1]).all():
                return path
    return None
