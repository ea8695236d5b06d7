"""Random arguments drawn on the device, and memory filled with numbers that must not come back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kernels.case import Case, fill
from kernels.packed import Packed

_LARGEST_FILL = 2**33  # bytes
# Smaller arrays are made on the host: on a device each shape would compile a program.
_FEW_BYTES = 2**25


def draw(case: Case, seed: int) -> tuple[Any, ...]:
    """Return a case's arguments: normal numbers, and the case's own integers.

    Small ones are those of Case.draw, which draws on the host: a billion numbers take it a minute.
    """
    shapes = case.shapes()
    if is_small(shapes):
        return case.draw(seed)
    integers = iter(case.integers())
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def one(shape: jax.ShapeDtypeStruct | Packed) -> jax.Array | Packed:
        if isinstance(shape, Packed):
            words = jax.random.bits(next(keys), shape.words.shape)
            return fill(shape, words, jax.random.uniform(next(keys), shape.scales.shape))
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jnp.asarray(next(integers), shape.dtype)
        return _normal(next(keys), shape.shape, jnp.dtype(shape.dtype).name)

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, Packed))


def upcast(tree: Any) -> Any:
    """Return a tree with its floating-point arrays in float32; packed ones stay as they are.

    What a packed number stands for is the same in any dtype.
    """

    def one(x):
        if isinstance(x, Packed) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if not isinstance(x, Tracer) and is_small(x):
            return jax.device_put(np.asarray(x).astype(np.float32))
        return x.astype(jnp.float32)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Packed))


def filled_like(shapes: Any, value: float) -> Any:
    """Return arrays that hold one number everywhere."""
    return jax.tree.map(lambda x: _full(x.shape, value, x.dtype), shapes)


def is_small(tree: Any) -> bool:
    """Whether the arrays of a tree, or descriptions of arrays, are small enough for the host."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves) < _FEW_BYTES


def scribble(num_bytes: int, value: float) -> None:
    """Write a number all over some memory and free it, so that the next program finds it there.

    A program's temporary buffers come from the freed memory of its size, as far as the allocator
    goes by best fit.
    """
    size = min(num_bytes, _LARGEST_FILL) // 4 + 1
    jax.block_until_ready(_full((size,), value, jnp.dtype(jnp.float32)))


def _full(shape: tuple[int, ...], value: float, dtype: Any) -> jax.Array:
    # On a CPU it may keep numpy's memory, which no output can take the place of.
    if jax.default_backend() != "cpu" and is_small(jax.ShapeDtypeStruct(shape, dtype)):
        return jax.device_put(np.full(shape, value, dtype))
    return jnp.full(shape, value, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)
