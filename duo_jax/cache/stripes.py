"""Caches on a mesh: full caches are cut along the text, rings are on every device.

A text is cut into stripes of 64 tokens, which devices hold in turn (kernels.stripes): position p
lies on device p // 64 % N of the mesh's axis "model", whatever the pattern of heads and the format.
All devices hold equally many tokens of every retrieval head, to within one stripe, at any length,
and attend to equally many. (Cut by heads instead, a layer waits for the device with most retrieval
heads: with one such head it would be as slow as with eight.) A stripe is what "int2" packs
together, and pages are whole stripes of every device.

A buffer of all devices is [batch, kv_heads, N * slots, head_dim], one device's slots after the
other's. Files hold tokens in order of position (`to_host`, `from_host`), for any number of devices.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from duo_jax.mesh import weights
from duo_jax.mesh.devices import DATA, MODEL, AnyMesh, fetched, num_parts, place
from kernels import stripes
from kernels.packed import BLOCK

FULL, RING = PartitionSpec(DATA, None, MODEL), PartitionSpec(DATA)

Slots = TypeVar("Slots", Array, np.ndarray)  # [batch, kv_heads, slots, _]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one device holds of a text that `num` devices share; by default all of it."""

    device: Int[Array, ""] | int = 0
    num: int = 1

    def since_first(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return positions counted from that of the first slot, as kernels take them."""
        return positions - BLOCK * self.device

    def held(self, lengths: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return how many of a text's first tokens the device holds."""
        return jnp.maximum(stripes.held(self.since_first(lengths), self.num), 0)

    def positions(self, slots: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return the positions that slots hold."""
        return BLOCK * self.device + stripes.position(slots, self.num)


ALL = Share()


def whole(slots: int, num: int) -> int:
    """Round slots up to whole stripes, equally many on each of several devices."""
    unit = BLOCK * num if num > 1 else 1
    return -(-slots // unit) * unit


def specs(cache: Any) -> Any:
    """Return how the arrays of a Cache, or of a part of one, are cut: a tree like it."""

    def of_leaf(path: Any, _: Any) -> PartitionSpec:
        names = {getattr(key, "name", None) for key in path}
        return FULL if "full" in names and "latest" not in names else RING

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


def in_order(x: Slots, num: int, tokens_per_slot: int = 1) -> Slots:
    """Put a buffer of all devices in order of position."""
    batch, heads, slots, channels = x.shape
    cut = x.reshape(batch, heads, num, -1, BLOCK // tokens_per_slot, channels)
    return cut.swapaxes(2, 3).reshape(batch, heads, slots, channels)


def by_device(x: Slots, num: int, tokens_per_slot: int = 1) -> Slots:
    """Put slots in order of position in that of a buffer of all devices."""
    batch, heads, slots, channels = x.shape
    cut = x.reshape(batch, heads, -1, num, BLOCK // tokens_per_slot, channels)
    return cut.swapaxes(2, 3).reshape(batch, heads, slots, channels)


def to_host(
    leaf: Shaped[Array, "batch kv_heads slots _"],
    filled: int,
    mesh: AnyMesh | None,
    tokens_per_slot: int = 1,
) -> Shaped[np.ndarray, "batch kv_heads filled _"]:
    """Return the first slots of a full cache's buffer in order of position."""
    if mesh is None:
        return np.asarray(leaf[:, :, :filled])
    return in_order(fetched(leaf), num_parts(mesh), tokens_per_slot)[:, :, :filled]


def from_host(
    empty: Shaped[Array, "batch kv_heads slots _"],
    stored: Shaped[np.ndarray, "batch kv_heads filled _"],
    mesh: AnyMesh,
    tokens_per_slot: int = 1,
) -> Shaped[Array, "batch kv_heads slots _"]:
    """Return a full cache's buffer like an empty one, with tokens in order of position."""
    ordered = np.zeros(empty.shape, empty.dtype)
    ordered[:, :, : stored.shape[2]] = stored
    striped = by_device(ordered, num_parts(mesh), tokens_per_slot)
    return weights.from_host(striped, place(mesh, *FULL))
