"""Convert a model: weights one way or the other, other files as they are.

Which files are copied is decided in convert.other_files.
"""

import json
import pathlib

import numpy as np
from tqdm import tqdm

from convert import checkpoint_writer, gguf_metadata, huggingface_writer, other_files
from convert.config import ConvertConfig
from convert.pickled_files import PickledFiles
from duo_jax.checkpoints import gguf, placed, pretrained
from duo_jax.checkpoints.orbax_checkpoint import (
    MARKER_FILE,
    PARAMS_FOLDER,
    marker_of,
)
from duo_jax.checkpoints.tensor_info import shortened
from duo_jax.checkpoints.weights import HuggingFaceFiles, WeightFiles, has_weights, open_weights
from duo_jax.errors import InputError
from duo_jax.files import new_folder
from duo_jax.schema import checksums
from duo_jax.schema.json_reader import read_json


def convert(flags: ConvertConfig) -> None:
    """Write the model `flags.src` to the folder `flags.dst`, which appears when complete.

    Host memory peaks at about the largest tensor, beyond the mapped files.

    Raises:
      InputError: there is no such model, it cannot be read, or `flags.dst` cannot be written.
    """
    source = pretrained.resolve(flags.src, allow_pickle=flags.allow_pickle)
    weight_files = _open(source, allow_pickle=flags.allow_pickle)
    if weight_files.format != "model":
        raise InputError(
            f"{flags.src} holds {weight_files.format} weights, which cannot be converted again: "
            "the original values are lost; name the model that it was converted from"
        )
    dtype = None if flags.dtype is None else np.dtype(flags.dtype)
    tensors = weight_files.tensors
    total = sum(weight_files.dtype(tensor).itemsize * tensor.size for tensor in tensors)
    with (
        new_folder(flags.dst) as folder,
        tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="converting") as bar,
    ):
        if flags.to_hf:
            huggingface_writer.write_params(
                folder,
                weight_files,
                dtype=dtype,
                max_shard_size=int(flags.max_shard_gb * 1e9),
                progress=bar.update,
            )
        else:
            digests = checkpoint_writer.write_params(
                folder / PARAMS_FOLDER,
                weight_files,
                dtype=dtype,
                stored=flags.weights,
                progress=bar.update,
            )
            marker = checksums.seal(marker_of(flags.weights) | {"digests": digests})
            (folder / MARKER_FILE).write_text(marker + "\n", encoding="utf-8")
        left_out = []
        if gguf.is_gguf(source):
            stored = {weight_files.dtype(tensor) for tensor in tensors}
            gguf_metadata.write(source, folder, dtype=placed.common_dtype(stored).name)
        else:
            left_out = other_files.copy(source, folder)
        if dtype is not None:
            _rewrite_dtype(folder / "config.json", dtype)
        _rewrite_tied(folder / "config.json", weight_files.architecture.tie_embeddings)
    print(f"{flags.dst} is complete: {len(tensors)} tensors, {total / 1e9:.3g} GB read")
    if left_out:
        print(f"not copied: {shortened(left_out)}")


def _open(folder: pathlib.Path, *, allow_pickle: bool) -> WeightFiles:
    if allow_pickle and not has_weights(folder):
        architecture = pretrained.load_config(folder)
        return HuggingFaceFiles(PickledFiles(folder), architecture, str(folder))
    return open_weights(folder)


def _rewrite_tied(path: pathlib.Path, tied: bool) -> None:
    """Make config.json say whether embeddings are tied, if it says something else."""
    raw = read_json(path)
    if tied != bool(raw.get("tie_word_embeddings")):
        raw["tie_word_embeddings"] = tied
        path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _rewrite_dtype(path: pathlib.Path, dtype: np.dtype) -> None:
    """Make config.json name the new type: transformers loads weights in the type it names."""
    raw = read_json(path)
    named = [key for key in ("dtype", "torch_dtype") if key in raw]
    raw |= dict.fromkeys(named or ["dtype"], dtype.name)
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
