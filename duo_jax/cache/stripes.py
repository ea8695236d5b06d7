"""Caches on a mesh: full caches are cut along the text, rings are on every device.

Position p of a text lies on device p % N of the mesh's axis "model", in slot p // N there, whatever
the pattern of heads: all devices hold equally many tokens of every retrieval head, to within one,
at any length, and attend to equally many. (Cut by heads instead, a layer waits for the device with
most retrieval heads: with one such head it would be as slow as with eight.) So N devices have

    held(n, d) = ceil((n - d) / N)      of the first n positions, on device d

A buffer of all devices is [batch, kv_heads, N * slots, head_dim], one device's slots after the
other's. Files hold tokens in order of position (`to_host`, `from_host`), for any number of devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from duo_jax.mesh import weights
from duo_jax.mesh.devices import DATA, MODEL, AnyMesh, fetched, num_parts, place

FULL, RING = PartitionSpec(DATA, None, MODEL), PartitionSpec(DATA)


def held(
    lengths: Int[Array, " batch"], device: Int[Array, ""] | int, num: int
) -> Int[Array, " batch"]:
    """Return how many of each row's first tokens a device holds."""
    return jnp.maximum((lengths - device + num - 1) // num, 0)


def specs(cache: Any) -> Any:
    """Return how the arrays of a Cache, or of a part of one, are cut: a tree like it."""

    def of_leaf(path: Any, _: Any) -> PartitionSpec:
        return FULL if any(getattr(key, "name", None) == "full" for key in path) else RING

    return jax.tree_util.tree_map_with_path(of_leaf, cache)


def shardings(mesh: AnyMesh, cache: Any) -> Any:
    """Return where the arrays of a Cache lie: a tree of shardings like it."""
    return jax.tree.map(lambda spec: place(mesh, *spec), specs(cache))


def pad(
    leaf: Shaped[Array, "batch kv_heads slots _"], more: int, mesh: AnyMesh | None
) -> Shaped[Array, "batch kv_heads _ _"]:
    """Return a full cache's buffer with more slots, those of every device at its own end."""
    if mesh is None:
        return _padded(leaf, more)
    return _pad_on(leaf, more=more // num_parts(mesh), mesh=mesh)


@functools.partial(jax.jit, static_argnames=("more", "mesh"))
def _pad_on(leaf: Array, *, more: int, mesh: AnyMesh) -> Array:
    padded = functools.partial(_padded, more=more)
    return jax.shard_map(padded, mesh=mesh, in_specs=FULL, out_specs=FULL)(leaf)


def _padded(leaf: Array, more: int) -> Array:
    return jnp.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0)))


def to_host(
    leaf: Shaped[Array, "batch kv_heads slots _"], filled: int, mesh: AnyMesh | None
) -> Shaped[np.ndarray, "batch kv_heads filled _"]:
    """Return the first slots of a full cache's buffer in order of position."""
    if mesh is None:
        return np.asarray(leaf[:, :, :filled])
    num = num_parts(mesh)
    batch, heads, slots, channels = leaf.shape
    on_host = fetched(leaf).reshape(batch, heads, num, slots // num, channels)
    return np.swapaxes(on_host, 2, 3).reshape(leaf.shape)[:, :, :filled]


def from_host(
    empty: Shaped[Array, "batch kv_heads slots _"],
    stored: Shaped[np.ndarray, "batch kv_heads filled _"],
    mesh: AnyMesh,
) -> Shaped[Array, "batch kv_heads slots _"]:
    """Return a full cache's buffer like an empty one, with tokens in order of position."""
    num = num_parts(mesh)
    batch, heads, slots, channels = empty.shape
    ordered = np.zeros(empty.shape, empty.dtype)
    ordered[:, :, : stored.shape[2]] = stored
    striped = np.swapaxes(ordered.reshape(batch, heads, slots // num, num, channels), 2, 3)
    return weights.from_host(striped.reshape(empty.shape), place(mesh, *FULL))
