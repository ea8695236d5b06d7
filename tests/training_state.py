"""A small training state, and work folders that hold checkpoints of it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from kernels import pytree
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    gates: jax.Array


def state(step: int) -> State:
    """Return the state after a step; no two of its numbers are equal."""
    return State(step=jnp.int32(step), gates=jnp.arange(6.0).reshape(2, 3) + step)


def workdir(path: pathlib.Path) -> WorkDir:
    return WorkDir(path, {"some": "settings"}, operational=())
