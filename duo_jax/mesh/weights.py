"""Where the weights of a model lie on a mesh: every device holds a part of each matrix.

    q, k, v       by heads                  o     by heads, as inputs
    gate, up      by channels of the MLP    down  by channels of the MLP, as inputs
    embedding     by channels               head  by tokens of the vocabulary

Norms, and the biases of sums over devices, are on all of them. So is a matrix whose axis cannot be
divided by the number of devices, such as the projections of 28 heads on 8.

The embedding is cut along its channels, not its tokens: else XLA gathers all of it for every token.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from duo_jax.mesh.devices import MODEL, AnyMesh, num_parts

# The axes that may be cut, in order of preference, by (module, leaf), without the axis of layers.
_AXES: dict[tuple[str, str], tuple[int, ...]] = {
    ("embed_tokens", "embedding"): (1,),
    ("lm_head", "kernel"): (1, 0),
    ("q_proj", "kernel"): (1,),
    ("k_proj", "kernel"): (1,),
    ("v_proj", "kernel"): (1,),
    ("q_proj", "bias"): (0,),
    ("k_proj", "bias"): (0,),
    ("v_proj", "bias"): (0,),
    ("o_proj", "kernel"): (0,),
    ("gate_proj", "kernel"): (1,),
    ("up_proj", "kernel"): (1,),
    ("gate_proj", "bias"): (0,),
    ("up_proj", "bias"): (0,),
    ("down_proj", "kernel"): (0,),
}


def spec(
    mesh: AnyMesh, path: tuple[str, ...], shape: tuple[int, ...], *, stacked: bool = False
) -> PartitionSpec:
    """Return how an array of the parameters is cut.

    Args:
      mesh: the devices.
      path: its place in the tree, such as ("layers", "mlp", "up_proj", "kernel"); that of an array
        of a quantised kernel goes on with "values" or "scales".
      shape: its shape.
      stacked: its first axis is that of layers (duo_jax.model.llama).
    """
    if path[-1] in ("values", "scales"):
        path = path[:-1]
    offset = int(stacked and path[0] == "layers")
    for axis in _AXES.get((path[-2], path[-1]), ()):
        if shape[axis + offset] % num_parts(mesh) == 0:
            return PartitionSpec(*[None] * (axis + offset), MODEL)
    return PartitionSpec()


def shardings(
    mesh: AnyMesh, params: Any, *, within: tuple[str, ...] = (), stacked: bool = False
) -> Any:
    """Return where parameters lie: a tree of shardings like that of the arrays, or their shapes.

    Args:
      mesh: the devices.
      params: parameters, or one of them.
      within: its path, if it is one of them.
      stacked: as in `spec`.
    """

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
        names = (*within, *(key for key in keys if key is not None))
        return NamedSharding(mesh, spec(mesh, names, leaf.shape, stacked=stacked))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def put(mesh: Mesh | None, path: tuple[str, ...], leaf: Any, *, stacked: bool = False) -> Any:
    """Move a parameter to the devices, to each its part; wait until it is there.

    Args:
      mesh: the devices; None: the default one.
      path: as in `spec`.
      leaf: a numpy array, of which every process has all, or one that is on these devices already,
        however it is cut; or a quantised kernel of such.
      stacked: as in `spec`.
    """
    if mesh is None:
        return jax.block_until_ready(jax.device_put(leaf))
    where = shardings(mesh, leaf, within=path, stacked=stacked)
    return jax.block_until_ready(jax.tree.map(_put, leaf, where))


def _put(x: Shaped[Array | np.ndarray, "..."], where: NamedSharding) -> Shaped[Array, "..."]:
    return jax.device_put(x, where) if isinstance(x, jax.Array) else from_host(x, where)


def stacked(
    mesh: Mesh,
    path: tuple[str, ...],
    leaves: Iterable[Shaped[Array | np.ndarray, "..."]],
    *,
    number: int,
) -> Shaped[Array, "..."]:
    """Stack a parameter of all layers, layer by layer: no device has more than one of them twice.

    Args:
      mesh: the devices.
      path: of the parameter.
      leaves: of every layer, as in `put`, of one shape and type.
      number: of layers.
    """
    whole = None
    for layer, leaf in enumerate(leaves):
        if whole is None:
            shape = (number, *leaf.shape)
            where = NamedSharding(mesh, spec(mesh, path, shape, stacked=True))
            zeros = functools.partial(jnp.zeros, shape, leaf.dtype)
            whole = jax.jit(zeros, out_shardings=where)()
        whole = _with_layer(whole, put(mesh, path, leaf), layer)
    assert whole is not None
    return jax.block_until_ready(whole)


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(whole: Array, leaf: Array, layer: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(whole, leaf, layer, 0)


def from_host(x: Shaped[np.ndarray, "..."], where: NamedSharding) -> Shaped[Array, "..."]:
    """Return an array of several devices, maybe of several processes, that each have all of it."""
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
