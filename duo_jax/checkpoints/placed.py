"""Read single parameters to where they belong: the default device, or the devices of a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from duo_jax.checkpoints.orbax_checkpoint import CheckpointFiles
from duo_jax.checkpoints.tensor_info import copy_cast
from duo_jax.checkpoints.tensor_names import Tensor
from duo_jax.checkpoints.weights import WeightFiles, read_array
from duo_jax.mesh import weights as mesh_weights
from duo_jax.model.quantised_weights import QuantisedKernel


def read_onto(
    mesh: Mesh | None, weight_files: WeightFiles, tensor: Tensor, dtype: np.dtype | None
) -> jax.Array | QuantisedKernel | None:
    """Read a tensor straight onto a mesh; None: it must go through the host.

    Args:
      mesh: the devices.
      weight_files: where it comes from.
      tensor: which.
      dtype: the type it should have; None: quantised.
    """
    if mesh is None or not isinstance(weight_files, CheckpointFiles):
        return None
    if dtype is None:
        as_it_is = weight_files.format != "model"
    else:
        as_it_is = weight_files.dtype(tensor) == dtype
    return weight_files.read_onto(mesh, tensor) if as_it_is else None


def placed_leaf(
    weight_files: WeightFiles, parts: list[Tensor], dtype: DTypeLike | None, mesh: Mesh | None
) -> jax.Array:
    """Read one leaf of the tree, its layers stacked, and move it to where it belongs."""
    path = parts[0].path
    if dtype is None:
        dtype = common_dtype({weight_files.dtype(tensor) for tensor in parts})
    wanted = np.dtype(dtype)
    if mesh is None:
        return mesh_weights.put(mesh, path, _read_leaf(weight_files, parts, wanted))

    def leaf_of(part: Tensor) -> Any:
        leaf = read_onto(mesh, weight_files, part, wanted)
        if leaf is not None:
            return leaf
        leaf = _read_leaf(weight_files, [part], wanted)
        return leaf if part.layer is None else leaf[0]

    if parts[0].layer is None:
        return mesh_weights.put(mesh, path, leaf_of(parts[0]))
    return mesh_weights.stacked(mesh, path, map(leaf_of, parts), number=len(parts))


def _read_leaf(weight_files: WeightFiles, parts: list[Tensor], dtype: np.dtype) -> np.ndarray:
    """Read one leaf of the tree, its layers stacked."""
    leaf = np.empty((len(parts), *parts[0].shape), dtype)
    for i, tensor in enumerate(parts):
        copy_cast(leaf[i], read_array(weight_files, tensor), tensor.name)
    return leaf if parts[0].layer is not None else leaf[0]


def common_dtype(stored: set[np.dtype]) -> np.dtype:
    """Return the one type in a set, else float32, which holds the values of every other exactly."""
    return stored.pop() if len(stored) == 1 else np.dtype(np.float32)
