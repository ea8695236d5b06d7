"""The map from slots to positions where several caches share a text."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import stripes
from kernels.packed import BLOCK


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_every_position_has_one_slot_in_one_cache(shares):
    slots = np.arange(3 * BLOCK)
    positions = [BLOCK * cache + stripes.position(slots, shares) for cache in range(shares)]
    np.testing.assert_array_equal(np.sort(np.concatenate(positions)), np.arange(3 * BLOCK * shares))
    for of_cache in positions:
        assert (np.diff(of_cache) > 0).all()


def test_stripes_go_to_the_caches_in_turn():
    np.testing.assert_array_equal(
        stripes.position(np.array([0, 63, 64, 127, 128]), 3), [0, 63, 192, 255, 384]
    )


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_the_slots_that_are_held_are_those_of_the_positions_before(shares):
    positions = stripes.position(np.arange(3 * BLOCK), shares)
    lengths = jnp.arange(3 * BLOCK * shares)
    wanted = (positions[None] < lengths[:, None]).sum(axis=1)
    np.testing.assert_array_equal(stripes.held(lengths, shares), wanted)
    assert stripes.held(-1 - lengths, shares).max() <= 0
