"""Go back to an earlier length of a cache: what was appended since is forgotten.

Full caches lose nothing by being appended to, slots beyond the length count as free. Rings do, so a
copy of them is made beforehand: they are small.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from duo_jax.cache.state import Cache, KVCache
from kernels import pytree

_Rings = tuple[tuple[KVCache | None, ...], ...]


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """Where to go back to."""

    rings: _Rings  # of each layer: the streaming one, and the latest tokens of full caches
    lengths: Int[Array, " batch"]
    kept: Int[Array, " batch"]


def mark(cache: Cache) -> Mark:
    """Return where the cache is now; what it refers to is copied, the cache may be donated."""
    here = Mark(
        rings=tuple(
            (layer.streaming, *(part.latest for part in layer.full)) for layer in cache.layers
        ),
        lengths=cache.lengths,
        kept=cache.kept,
    )
    return jax.tree.map(jnp.copy, here)


def rewind(cache: Cache, to: Mark) -> Cache:
    """Return the cache as it was at the mark, but for slots that are free."""
    layers = (
        dataclasses.replace(
            layer,
            streaming=streaming,
            full=tuple(
                dataclasses.replace(part, latest=ring)
                for part, ring in zip(layer.full, latest, strict=True)
            ),
        )
        for layer, (streaming, *latest) in zip(cache.layers, to.rings, strict=True)
    )
    return Cache(layers=tuple(layers), lengths=to.lengths, kept=to.kept)
