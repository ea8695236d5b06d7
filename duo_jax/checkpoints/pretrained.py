"""Find a model by name; load its config, parameters and tokenizer.

Everything that takes a model takes a Hugging Face folder, a hub name ("org/name"), a converted
checkpoint (`python -m convert`) or a GGUF file; `resolve` turns any of them into a folder or that
file, and the other functions treat all of them alike.
"""

import dataclasses
import importlib.resources
import pathlib
import re
from typing import Any, get_args

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool
from tqdm import tqdm

from duo_jax.checkpoints import gguf, tokenizer_files
from duo_jax.checkpoints.folder_kinds import refuse_what_is_no_model
from duo_jax.checkpoints.orbax_checkpoint import nested
from duo_jax.checkpoints.placed import common_dtype, placed_leaf, read_onto
from duo_jax.checkpoints.safetensors_files import has_safetensors
from duo_jax.checkpoints.tensor_info import copy_cast
from duo_jax.checkpoints.tensor_names import Path, Tensor
from duo_jax.checkpoints.weights import WeightFiles, load_architecture, open_weights
from duo_jax.errors import InputError
from duo_jax.files import exists, is_file, is_folder
from duo_jax.heads import split
from duo_jax.mesh import weights as mesh_weights
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import (
    QuantisedKernel,
    WeightFormat,
    check_weight_format,
    is_quantised,
    quantise,
    stored_format,
)
from duo_jax.schema.check import path_argument

DEMO = "demo"  # the model that ships with duo_jax
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(name: str | pathlib.Path, *, allow_pickle: bool = False) -> pathlib.Path:
    """Return the folder of a model, or its GGUF file, downloading it if it is a hub name.

    The cache and offline settings of huggingface_hub apply (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).

    Args:
      name: a local folder, a GGUF file, "org/name", or "demo" for the model that ships with
        duo_jax.
      allow_pickle: fetch pickled weights if a hub model has no safetensors.

    Raises:
      InputError: there is no such model, or it cannot be fetched.
    """
    path_argument("model", name)
    path = pathlib.Path(name)
    if str(name) and is_folder(path):  # Path("") would be the current folder
        gguf.refuse_folder(path)
        return path
    if name == DEMO:
        return pathlib.Path(str(importlib.resources.files("duo_jax") / "demo"))
    if is_file(path):
        if gguf.is_gguf(path):
            return path
        raise InputError(
            f"{path} is a file; a model is a folder or a hub name such as org/name, or a GGUF file"
        )
    if not str(name):
        raise InputError("the model's name is empty: what should have printed it may have failed")
    if not _HUB_NAME.fullmatch(str(name)):
        raise InputError(
            f"no such model: {str(name)!r} is neither a folder nor a hub name such as org/name, "
            "nor a GGUF file"
        )
    files = ["*.json", *tokenizer_files.TOKENIZER_FILES]
    folder = _download(str(name), [*files, "*.safetensors"])
    if allow_pickle and not has_safetensors(folder):
        return _download(str(name), [*files, "pytorch_model*.bin"])
    return folder


def resolve_config(name: str | pathlib.Path) -> pathlib.Path:
    """Return a model's config.json, a folder that holds it, or a GGUF file; fetch nothing else.

    Args:
      name: as in `resolve`, or the file itself.

    Raises:
      InputError: as `resolve`.
    """
    path = pathlib.Path(name)
    if is_file(path):
        return path
    if not is_folder(path) and _HUB_NAME.fullmatch(str(name)):
        return _download(str(name), ["config.json"])
    folder = resolve(name)
    if not exists(folder / "config.json"):
        refuse_what_is_no_model(folder)
    return folder


def load_config(folder: pathlib.Path) -> ModelConfig:
    """Read the architecture of the model in `folder`, a config.json or a GGUF file.

    Raises:
      InputError: there is no readable config.json, or the model is not supported.
    """
    return load_architecture(folder)


def load_params(
    folder: pathlib.Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Load all parameters as the nested dict that duo_jax.model.llama describes.

    Layers are stacked one leaf at a time, so host memory peaks at about one stacked leaf beyond
    what the device holds. Several devices get their parts tensor by tensor.

    Args:
      folder: a Hugging Face folder, a converted checkpoint or a GGUF file.
      dtype: type to cast to; None keeps each tensor's own.
      mesh: the devices that share the parameters (duo_jax.mesh.weights); default: the first one.

    Raises:
      InputError: files are missing or damaged, or tensors do not fit config.json; all of them are
        listed at once.
    """
    weight_files = open_weights(folder)
    if weight_files.format != "model":
        raise InputError(
            f"{folder} holds {weight_files.format} weights, which can be served but not trained "
            "with: name the model that it was converted from"
        )
    parts: dict[Path, list[Tensor]] = {}  # in order of layers
    for tensor in weight_files.tensors:
        parts.setdefault(tensor.path, []).append(tensor)
    # The array is handed over, so that a leaf is on the device before the next one is read.
    return nested({p: placed_leaf(weight_files, ts, dtype, mesh) for p, ts in parts.items()})


def load_split_params(
    model: pathlib.Path | WeightFiles,
    heads: Bool[np.ndarray, "layers kv_heads"],
    *,
    dtype: DTypeLike | None = None,
    weights: WeightFormat = "model",
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Load all parameters in serving form: one dict per layer, retrieval heads first.

    Loads tensor by tensor, so host memory peaks at about one tensor beyond what the device holds.
    Each of several devices gets its part of the tensor, and nothing else; where a converted
    checkpoint has the wanted type, each process reads only the parts of its own devices.

    Args:
      model: a Hugging Face folder, a converted checkpoint or a GGUF file; or one that is open.
      heads: which KV heads are retrieval heads.
      dtype: type to cast to; None keeps the stored type, or takes float32 if there are several.
        Weights are quantised from the stored values, not from values of this type.
      weights: format of the layers' projections, see duo_jax.model.quantised_weights.
      mesh: the devices that share the parameters (duo_jax.mesh.weights); default: the first one.

    Raises:
      InputError: as `load_params`; or the model holds weights in another quantised format.
    """
    check_weight_format(weights)
    weight_files = open_weights(model) if isinstance(model, pathlib.Path) else model
    if weight_files.format not in ("model", stored_format(weights)):
        stored = weight_files.format
        fitting = [name for name in get_args(WeightFormat) if stored_format(name) == stored]
        raise InputError(
            f"the model holds {stored} weights: load it with weights {' or '.join(fitting)}, "
            f"not {weights}"
        )

    def quantised(tensor: Tensor) -> bool:
        return weights != "model" and is_quantised(tensor.path)

    if dtype is None:
        plain = (tensor for tensor in weight_files.tensors if not quantised(tensor))
        dtype = common_dtype({weight_files.dtype(tensor) for tensor in plain})
    ends: dict[Path, Any] = {}
    layers: list[dict[Path, Any]] = [{} for _ in heads]
    bar = tqdm(weight_files.tensors, desc="weights", unit="tensor", leave=False, disable=None)
    for tensor in bar:
        wanted = None if quantised(tensor) else np.dtype(dtype)
        leaf = read_onto(mesh, weight_files, tensor, wanted)
        if leaf is None:
            leaf = weight_files.read(tensor)
            if wanted is not None:
                assert isinstance(leaf, np.ndarray), f"{tensor.name} is stored quantised"
                array = np.empty(tensor.shape, wanted)
                copy_cast(array, leaf, tensor.name)
                leaf = array
        if tensor.layer is not None:
            leaf = split.reorder(
                weight_files.architecture, tensor.path[-2:], leaf, heads[tensor.layer]
            )
        if quantised(tensor):
            leaf = _quantised(tensor, leaf, weights)
        leaf = mesh_weights.put(mesh, tensor.path, leaf)
        if tensor.layer is None:
            ends[tensor.path] = leaf
        else:
            layers[tensor.layer][tensor.path[1:]] = leaf
    return nested(ends) | {"layers": tuple(nested(layer) for layer in layers)}


def load_tokenizer(folder: pathlib.Path) -> Any:
    """Load the tokenizer of the model in `folder`, or a GGUF file, without touching the network.

    Returns:
      A transformers tokenizer.

    Raises:
      InputError: there are no tokenizer files, or transformers cannot use them.
    """
    if gguf.is_gguf(folder):
        from duo_jax.checkpoints.gguf import tokenizer  # takes the library `tokenizers`

        return tokenizer.load_tokenizer(gguf.read_header(folder))
    return tokenizer_files.load_tokenizer(folder)


def _quantised(tensor: Tensor, leaf: split.Leaf, weight_format: WeightFormat) -> QuantisedKernel:
    """Return one projection in the wanted format; quantise it unless it is stored quantised."""
    if isinstance(leaf, QuantisedKernel):
        return dataclasses.replace(leaf, format=weight_format)
    return quantise(
        np.asarray(leaf), module=tensor.path[-2], weight_format=weight_format, name=tensor.name
    )


def _download(name: str, patterns: list[str]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=patterns,
            # Sub-folders and consolidated files repeat the weights in other formats.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its terms on https://huggingface.co/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"no such model: {name} is neither a folder here nor a public model on the "
            "Hugging Face hub (a private one needs `hf auth login` or HF_TOKEN)"
        ) from None
    except Exception as error:  # network, disk, cache: the libraries' errors share no base class
        raise InputError(
            f"{name} is not a folder here, and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {_first_sentence(error)})"
        ) from None
    return pathlib.Path(folder)


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[.!])\s", " ".join(str(error).split()))[0]
