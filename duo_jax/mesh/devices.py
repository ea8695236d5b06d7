"""Which devices run a model: how many, which numbers are possible, and what all of them hold."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count
from kernels import by_heads

DATA, MODEL = "data", by_heads.AXIS  # axes of a mesh: of a batch's rows; of weights and positions

AnyMesh = Mesh | AbstractMesh  # an abstract one for shapes alone

Tree = TypeVar("Tree")


def make_mesh(devices: Sequence[Any], *, data: int = 1) -> Mesh:
    """Return a mesh of these devices; `data` groups of them have rows of their own."""
    shape = (data, len(devices) // data)
    return jax.make_mesh(
        shape, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=tuple(devices)
    )


def abstract_mesh(number: int) -> AbstractMesh:
    """Return a mesh of devices that need not exist, to ask where shapes would lie."""
    return AbstractMesh((1, number), (DATA, MODEL))


def num_parts(mesh: AnyMesh | None) -> int:
    """Return how many devices share weights and positions."""
    return 1 if mesh is None else mesh.shape[MODEL]


def possible(architecture: ModelConfig, most: int, *, by_heads: bool = False) -> list[int]:
    """Return the numbers of devices, up to `most`, that can share a model's matrices.

    The largest ones, of the MLP and of the embedding, must be divisible. Heads need not be: the
    projections of those that cannot be shared are on every device.

    Args:
      architecture: the model.
      most: number of devices that there are.
      by_heads: whether KV heads are shared as well, as identification does.
    """
    sizes = (architecture.mlp_size, architecture.embed_size)
    sizes += (architecture.num_kv_heads,) if by_heads else ()
    return [n for n in range(1, most + 1) if not any(size % n for size in sizes)]


def num_groups(mesh: AnyMesh | None) -> int:
    """Return how many groups of devices have rows of a batch of their own."""
    return 1 if mesh is None else mesh.shape[DATA]


def mesh_of(
    architecture: ModelConfig, number: int, *, groups: int = 1, by_heads: bool = False
) -> Mesh | None:
    """Return a mesh of so many devices; None of one, which needs none.

    Args:
      architecture: the model.
      number: how many, in all groups together.
      groups: groups that each have all of the model, and rows of their own.
      by_heads: as in `possible`.

    Raises:
      InputError: there are fewer, or they cannot share the model; the message says which can.
    """
    number = argument("devices", number, Count)
    present = jax.devices()
    groups = argument("groups", groups, Count)
    some = possible(architecture, len(present) // groups, by_heads=by_heads)
    fitting = [groups * each for each in some]
    if not fitting:
        raise InputError(f"{groups} groups need as many devices; there are {len(present)}")
    if number not in fitting:
        there = f"of {present[0].device_kind} there are {len(present)}"
        why = there if number > len(present) else "they cannot share its matrices evenly"
        works = ", ".join(map(str, fitting))
        them = f"{number} devices" + (f" in {groups} groups" if groups > 1 else "")
        raise InputError(f"{them} cannot run this model: {why}; possible: {works}")
    if jax.process_count() > 1 and number != len(present):
        raise InputError(
            f"{jax.process_count()} processes use all of their {len(present)} devices, not {number}"
        )
    if jax.process_count() > 1 and groups > 1:
        raise InputError("several processes have no groups: leave it at 1")
    return None if number == 1 else make_mesh(present[:number], data=groups)


def automatic(
    architecture: ModelConfig, needed: Callable[[], int], *, by_heads: bool = False
) -> Mesh | None:
    """Return the devices for a model that needs some bytes in all: one, if that has them.

    Else all that can share it. The processors of a machine share its memory, and count as one; the
    processes of a cluster were started to be used.

    Args:
      architecture: the model.
      needed: counts the bytes of weights and caches.
      by_heads: as in `possible`.
    """
    present = jax.devices()
    if jax.process_count() == 1:
        memory = (present[0].memory_stats() or {}).get("bytes_limit")
        if present[0].platform == "cpu" or memory is None or needed() <= memory:
            return None
    most = possible(architecture, len(present), by_heads=by_heads)[-1]
    return mesh_of(architecture, most, by_heads=by_heads)


def place(mesh: AnyMesh, *axes: str | None) -> NamedSharding:
    """Return where an array lies whose axes are cut along these axes of the mesh.

    It is written as compiled programs write it, without what cuts nothing: jax compiles a program
    again for arguments that lie in the same places by another name.
    """
    cut = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in axes]
    while cut and cut[-1] is None:
        cut.pop()
    return NamedSharding(mesh, PartitionSpec(*cut))


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which attention is computed by heads on these devices.

    For whole sequences (kernels.by_heads); caches know their devices themselves.
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_under(params: Any) -> Mesh | None:
    """Return the mesh on which parameters lie; None: one device."""
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def on_all(tree: Tree, mesh: Mesh | None) -> Tree:
    """Copy arrays to all devices of a mesh."""
    return tree if mesh is None else jax.device_put(tree, place(mesh))


def on_one(tree: Tree, mesh: Mesh | None) -> Tree:
    """Gather arrays of a mesh on the default device, for use `within` the mesh or without one."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)  # bound to no device


def fetched(x: Shaped[Array | np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return an array on the host, also where other processes hold parts of it: all must call."""
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return np.asarray(x)
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    whole = np.empty(x.shape, x.dtype)
    for part in x.addressable_shards:  # np.asarray(x) would stay in memory as long as x
        whole[part.index] = np.asarray(part.data)
    return whole


def replicated(x: Tree, mesh: AnyMesh | None) -> Tree:
    """Tell the compiler that every device of the "model" axis holds all of these arrays' rows."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, place(mesh, DATA))


def described(mesh: Mesh | None) -> str:
    """Return what runs the model, in words."""
    first = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    number = 1 if mesh is None else mesh.size
    return f"{number} x {first.device_kind}"
