"""Go back to an earlier length of a cache: what was appended since is forgotten.

Full caches lose nothing by being appended to, slots beyond the length count as free. Rings do, so a
copy of them is made beforehand: they are small.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from duo_jax.cache.pages import Rings, rings_of, with_rings
from duo_jax.cache.state import Cache
from kernels import pytree


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """Where to go back to."""

    rings: Rings  # of each layer: the streaming one, and the latest tokens of full caches
    lengths: Int[Array, " batch"]
    kept: Int[Array, " batch"]


def mark(cache: Cache) -> Mark:
    """Return where the cache is now; what it refers to is copied, the cache may be donated."""
    here = Mark(
        rings=rings_of(cache.layers),
        lengths=cache.lengths,
        kept=cache.kept,
    )
    return jax.tree.map(jnp.copy, here)


def rewind(cache: Cache, to: Mark) -> Cache:
    """Return the cache as it was at the mark, but for slots that are free."""
    layers = with_rings(cache.layers, to.rings)
    return dataclasses.replace(cache, layers=layers, lengths=to.lengths, kept=to.kept)
