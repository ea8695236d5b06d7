"""Stripes: how several caches share the positions of a text.

Stripes of 64 tokens, a block of packed keys (kernels.packed), go to N caches in turn. The slots of
a cache follow each other in order of position. With positions counted from the one that its first
slot holds, which is 64 d in cache d,

    position(s) = (s // 64) * 64 N + s % 64
    held(n)     = (n // 64N) * 64 + min(n % 64N, 64)      slots whose positions are below n

and slot = position if N = 1. Kernels compute this too.
"""

from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels.packed import BLOCK

Slots = TypeVar("Slots", Array, np.ndarray)  # numpy for numpy


def position(slots: Slots, shares: int) -> Slots:
    """Return the positions that slots hold, of a text that so many caches share."""
    if shares == 1:
        return slots
    return slots + (slots & -BLOCK) * (shares - 1)  # `& -BLOCK`: those of earlier stripes


def held(length: Int[Array, "..."], shares: int) -> Int[Array, "..."]:
    """Return how many slots hold the first positions; at most 0 where `length` is negative."""
    if shares == 1:
        return length
    rounds = length // (BLOCK * shares)
    return rounds * BLOCK + jnp.minimum(length - rounds * (BLOCK * shares), BLOCK)


def filled(length: Int[Array, "..."], shares: int, slots: int) -> Int[Array, "..."]:
    """Return how many of a cache's slots hold the first positions, of which it may hold none."""
    return jnp.clip(held(length, shares), 0, slots)
