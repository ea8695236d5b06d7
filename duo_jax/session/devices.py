"""Which devices serve a model: as many as are asked for, else as many as its bytes need."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from duo_jax.cache import cache_bytes
from duo_jax.errors import InputError
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh import devices
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.serve.ahead_of_time import param_shapes, tree_bytes


def choose(
    number: int | None,
    config: DuoConfig,
    *,
    groups: int = 1,
    dtype: DTypeLike,
    weights: WeightFormat,
    kv: str,
) -> Mesh | None:
    """Return the devices that share a model; None: the default one has all of it.

    Args:
      number: how many; None: all GPUs, if one has too little memory for the weights and a cache of
        the model's range, else one.
      config: the split model.
      groups: as in `duo_jax.mesh.devices.mesh_of`; several need a number.
      dtype: of activations.
      weights: format of the weights.
      kv: format of the caches.

    Raises:
      InputError: so many cannot run the model; the message says which numbers can.
    """
    architecture = config.architecture
    if number is not None:
        return devices.mesh_of(architecture, number, groups=groups)
    if groups != 1:
        raise InputError(f"groups {groups} need a number of devices")
    if len(jax.devices()) == 1:
        return None

    def needed() -> int:
        shapes = param_shapes(architecture, np.dtype(dtype), weights=weights)
        sizes = {"batch_size": 1, "max_len": architecture.max_positions, "dtype": dtype, "kv": kv}
        return tree_bytes(shapes) + cache_bytes(config, **sizes)

    return devices.automatic(architecture, needed)
