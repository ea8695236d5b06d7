"""All combinations of several choices, of which a few are tested by default."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def spanning(*axes: Sequence[Any]) -> list[Any]:
    """Return parameter sets of all combinations, slow but for those on a diagonal.

    It goes through all axes at once and begins a shorter one again, so that every value of every
    axis is on it: of (a, b) and (1, 2, 3), a1, b2 and a3.
    """
    diagonal = {
        tuple(step % len(axis) for axis in axes) for step in range(max(len(axis) for axis in axes))
    }
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places, strict=True)),
            marks=[] if places in diagonal else [pytest.mark.slow],
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
