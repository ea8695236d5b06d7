"""Shapes and bytes of caches, before and after there are any."""

import functools
from typing import Any

import jax

from duo_jax.cache.pages import rings_of
from duo_jax.cache.state import Cache, empty
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh.devices import num_groups, num_parts


def cache_shapes(config: DuoConfig, **sizes: Any) -> Cache:
    """Return the shapes of `init_cache(config, **sizes)`; nothing is allocated."""
    return jax.eval_shape(functools.partial(empty, config, **sizes))


def cache_bytes(config: DuoConfig, **sizes: Any) -> int:
    """Return the bytes of the layers' caches that `init_cache(config, **sizes)` allocates."""
    return _bytes(cache_shapes(config, **sizes).layers)


def device_bytes(config: DuoConfig, **sizes: Any) -> int:
    """Return the bytes of the layers' caches on each of the devices that share them."""
    layers, mesh = cache_shapes(config, **sizes).layers, sizes.get("mesh")
    rings = _bytes(rings_of(layers))
    return ((_bytes(layers) - rings) // num_parts(mesh) + rings) // num_groups(mesh)


def live_bytes(cache: Cache) -> int:
    """Return the bytes that all key and value buffers take on their devices."""
    if cache.mesh is not None:
        return cache.nbytes  # what is on all devices, the rings, counts once
    return sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(cache.layers))


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
