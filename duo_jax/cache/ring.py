"""The ring of a streaming head: which slot a position has, and which position a slot holds.

A ring has sink + recent slots. The first `sink` positions of a text stay where they are; later
positions take turns in the other slots:

    slot(p) = p                            if p < sink
              sink + (p - sink) % recent   otherwise

So after n tokens the filled slots are the first min(n, sink + recent), and slot s holds the latest
position with slot(p) = s:

    position(s) = s                                    if s < sink
                  (n - 1) - (n - 1 - s) % recent       otherwise, while that is at least sink
"""

import jax.numpy as jnp
from jaxtyping import Array, Int


def ring_slot(
    positions: Int[Array, "*shape"], *, sink_size: int, slots: int
) -> Int[Array, "*shape"]:
    """Return the slot of each position, from 0."""
    in_turn = sink_size + (positions - sink_size) % (slots - sink_size)
    return jnp.where(positions < sink_size, positions, in_turn)


def ring_position(
    lengths: Int[Array, "batch 1"], *, sink_size: int, slots: int
) -> Int[Array, "batch slots"]:
    """Return the position that each slot of a ring holds after some tokens.

    Slots that nothing has been written to get a position that is not below the length, or, beyond
    the sinks, one below the size of the sinks.
    """
    slot, last = jnp.arange(slots, dtype=lengths.dtype)[None, :], lengths - 1
    return jnp.where(slot < sink_size, slot, last - (last - slot) % (slots - sink_size))
