"""The pattern of a model for which nobody named one: its own, or one that ships with duo_jax.

A model's own pattern lies in the subfolder "pattern" of its folder. Patterns that ship lie in
duo_jax/patterns, with the presets they were made and measured with, and belong to published models,
which people keep under any name and in many formats. So a model is known by a fingerprint: its
shape, and the digest of all its norms, which every format keeps as they are (GGUF files of any
type, 8- and 4-bit checkpoints), while another model of the same shape has others.
"""

import importlib.resources
import json
import pathlib

import ml_dtypes

from duo_jax import files
from duo_jax.checkpoints.weights import WeightFiles, has_weights, open_weights, read_array
from duo_jax.errors import InputError
from duo_jax.heads.pattern import load_pattern
from duo_jax.model.config import ModelConfig
from duo_jax.schema import checksums

OWN = "pattern"  # a folder in a model's folder
FINGERPRINT = "model_fingerprint"  # a key in the config.json of a pattern that ships
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
    """Return what tells a model from others, whatever its format: a digest of shape and norms."""
    shape = json.dumps([getattr(weight_files.architecture, name) for name in _SHAPE])
    # Published weights are bfloat16, or at least trained ones differ in it; a cast to another type
    # must not hide a model.
    norms = [
        read_array(weight_files, tensor).astype(ml_dtypes.bfloat16).tobytes()
        for tensor in weight_files.tensors
        if tensor.path[-1] == "scale"
    ]
    return checksums.of_bytes(b"".join([shape.encode(), *norms]))


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
    found = fingerprint(open_weights(folder))
    return next((path for path, p in fitting.items() if p.extra[FINGERPRINT] == found), None)
