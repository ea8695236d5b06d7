"""Converted checkpoints: the format that `python -m convert` writes, and a reader.

    duo_jax.json        {"format": "duo_jax checkpoint", "version": 1, "digests": {...}}, with a
                        checksum of every array and of itself (duo_jax.schema.checksums; those of
                        earlier versions have none); with quantised projections
                        {..., "version": 2, "weights": "int8", ...}
    params/             an orbax checkpoint (zstd-compressed, OCDBT)
    config.json, ...    the other files of the original model folder, unchanged

The tree in params/ is that of duo_jax.model.llama, except that layers are not stacked, so that
single tensors can be written and read: layers/self_attn/q_proj/kernel is stored as the arrays
layers/0/self_attn/q_proj/kernel to layers/31/self_attn/q_proj/kernel. A quantised kernel
(duo_jax.model.quantised_weights) is stored as two arrays, kernel/values and kernel/scales.
"""

import pathlib
from typing import Any, get_args

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding

from duo_jax.checkpoints import tensor_info, tensor_names
from duo_jax.checkpoints.quiet_orbax import quiet_orbax
from duo_jax.checkpoints.tensor_info import DTYPES, TensorInfo
from duo_jax.checkpoints.tensor_names import Path, Tensor
from duo_jax.errors import InputError, quoted
from duo_jax.files import absolute, check_folder, exists
from duo_jax.mesh import weights as mesh_weights
from duo_jax.mesh.devices import fetched
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import (
    QuantisedKernel,
    StoredFormat,
    is_quantised,
    num_input_axes,
    scales_shape,
    value_dtype,
)
from duo_jax.process import signals
from duo_jax.schema import checksums
from duo_jax.schema.check import convert

MARKER_FILE = "duo_jax.json"
PARAMS_FOLDER = "params"
FORMAT = "duo_jax checkpoint"
VERSION = 1
QUANTISED_VERSION = 2  # readers that predate quantised weights refuse it


class _Marker(msgspec.Struct):
    """What duo_jax.json holds; keys of later versions are ignored."""

    format: str
    version: int
    digests: dict[str, str]
    weights: str | None = None


def orbax_path(folder: pathlib.Path) -> pathlib.Path:
    """Return a folder's path as orbax needs it: from the root, and in UTF-8.

    Raises:
      InputError: the path has other bytes, or the current folder was removed.
    """
    path = absolute(folder)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: a checkpoint's path must be UTF-8") from None
    return path


class CheckpointFiles:
    """Tensors of a converted checkpoint.

    Raises:
      InputError: the checkpoint is damaged, of another version, or does not fit its config.json.
    """

    def __init__(self, folder: pathlib.Path, architecture: ModelConfig) -> None:
        self.architecture = architecture
        self.tensors = tensor_names.tensors(architecture)
        self._path = orbax_path(folder / PARAMS_FOLDER)
        self.format: StoredFormat
        self.format, self._digests = _read_marker(folder / MARKER_FILE)
        check_folder(self._path)
        self._metadata = self._read_metadata()
        tensor_info.check(
            {"/".join(path): self._info(path) for path in self._metadata},
            {
                "/".join(path): shape
                for tensor in self.tensors
                for path, shape in stored_shapes(tensor, self.format).items()
            },
            where=str(folder),
        )

    def dtype(self, tensor: Tensor) -> np.dtype:
        first, *_ = stored_shapes(tensor, self.format)
        return np.dtype(self._metadata[first].dtype)

    def read(self, tensor: Tensor) -> np.ndarray | QuantisedKernel:
        return self._joined(
            [np.asarray(self._read(path)) for path in stored_shapes(tensor, self.format)]
        )

    def read_onto(self, mesh: Mesh, tensor: Tensor) -> jax.Array | QuantisedKernel:
        """Read one tensor straight onto devices: each process reads what belongs to its own.

        Args:
          mesh: the devices, which share it as duo_jax.mesh.weights says.
          tensor: in the type that it is stored in; all processes must ask for it.

        Raises:
          InputError: it is damaged.
        """
        parts = []
        for path, shape in stored_shapes(tensor, self.format).items():
            end = path[len(stored_path(tensor)) :]
            cut = mesh_weights.spec(mesh, (*tensor.path, *end), shape)
            parts.append(self._read(path, NamedSharding(mesh, cut)))
        return self._joined(parts)

    def _joined(self, parts: list[Any]) -> Any:
        """Return the arrays that a tensor is stored as, as one."""
        if len(parts) == 1:
            return parts[0]
        values, scales = parts
        return QuantisedKernel(values=values, scales=scales, format=self.format)

    def _read(self, path: Path, where: NamedSharding | None = None) -> Any:
        from orbax.checkpoint.experimental import v1 as ocp

        target = self._metadata[path]
        if where is not None:
            target = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=where)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with quiet_orbax(), context:
                leaf = ocp.load(str(self._path), nested({path: target}))
        except Exception as error:  # orbax and tensorstore have no common error for damaged files
            raise self._damaged(error) from None
        for key in path:
            leaf = leaf[key]
        name = "/".join(path)
        # tensorstore checks only what describes arrays.
        if self._digests is not None and self._digests.get(name) != checksums.of_array(
            fetched(leaf)
        ):
            raise InputError(f"{self._path} is damaged: {name} is not what was written")
        return leaf

    def _read_metadata(self) -> dict[Path, Any]:
        from orbax.checkpoint.experimental import v1 as ocp  # takes a second to import

        try:
            with quiet_orbax():
                return flattened(ocp.metadata(str(self._path)).metadata)
        except Exception as error:  # as above
            raise self._damaged(error) from None

    def _info(self, path: Path) -> TensorInfo:
        leaf = self._metadata[path]
        dtype = np.dtype(leaf.dtype)
        accepted = list(DTYPES.values())
        if self.format != "model" and path[-1] in ("values", "scales"):
            accepted = [value_dtype(self.format) if path[-1] == "values" else np.dtype(np.float32)]
        known = dtype in accepted
        return TensorInfo(shape=leaf.shape, dtype_name=dtype.name, dtype=dtype if known else None)

    def _damaged(self, error: Exception) -> InputError:
        signals.check()  # which orbax may have turned into this error
        return InputError(f"{self._path} is damaged ({type(error).__name__}: {str(error)[:200]})")


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder is a converted checkpoint."""
    return exists(folder / MARKER_FILE)


def stored_path(tensor: Tensor) -> Path:
    """Return the path of a tensor in the stored tree, such as layers/3/mlp/up_proj/kernel."""
    if tensor.layer is None:
        return tensor.path
    return (tensor.path[0], str(tensor.layer), *tensor.path[1:])


def stored_shapes(tensor: Tensor, stored: StoredFormat) -> dict[Path, tuple[int, ...]]:
    """Return path and shape of every array that a tensor is stored as."""
    path = stored_path(tensor)
    if stored == "model" or not is_quantised(tensor.path):
        return {path: tensor.shape}
    scales = scales_shape(tensor.shape, num_input_axes(tensor.path[-2]), stored)
    return {(*path, "values"): tensor.shape, (*path, "scales"): scales}


def marker_of(stored: StoredFormat) -> dict[str, Any]:
    """Return the contents of duo_jax.json, but for checksums."""
    if stored == "model":
        return {"format": FORMAT, "version": VERSION}
    return {"format": FORMAT, "version": QUANTISED_VERSION, "weights": stored}


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Turn {("a", "b"): leaf} into {"a": {"b": leaf}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def flattened(tree: dict[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Turn {"a": {"b": leaf}} into {("a", "b"): leaf}."""
    leaves = {}
    for key, value in tree.items():
        path = (*prefix, key)
        leaves |= flattened(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def _read_marker(path: pathlib.Path) -> tuple[StoredFormat, dict[str, str] | None]:
    """Return the format in which weights are stored, and the checksums of arrays, if there are."""
    marker, undamaged = checksums.read_sealed(path)
    stored = _stored_format(path, marker)
    if undamaged:
        return stored, convert(marker, _Marker, str(path)).digests
    if undamaged is None and marker == marker_of(stored):  # of an earlier version
        return stored, None
    reason = "it lacks its checksum" if undamaged is None else "its checksum is another"
    raise InputError(f"{path} is damaged: {reason}")


def _stored_format(path: pathlib.Path, marker: dict[str, Any]) -> StoredFormat:
    found = (marker.get("format"), marker.get("version"), marker.get("weights"))
    for stored in get_args(StoredFormat):
        expected = marker_of(stored)
        if found == (expected["format"], expected["version"], expected.get("weights")):
            return stored
    weights = "" if found[2] is None else f", weights {quoted(found[2])}"
    raise InputError(
        f"{path} says {quoted(found[0])}, version {quoted(found[1])}{weights}; this duo_jax reads "
        f"{FORMAT!r}, version {VERSION}, or {QUANTISED_VERSION} with weights int8 or int4: convert "
        "the model again, or update duo_jax"
    )
