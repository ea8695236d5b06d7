"""The limit of 32 bits on the arrays that a Triton kernel can address."""

from collections.abc import Callable
from typing import Any

import jax

from kernels.errors import UnsupportedError

# Offsets inside a Triton kernel are 32-bit element counts, even from 64-bit indices. Larger ones
# wrap around silently.
MAX_ELEMENTS = 2**31 - 1


def too_large(*trees: Any) -> str | None:
    """Return why the largest array of some trees cannot be addressed; None if it can."""
    largest = max(jax.tree.leaves(trees), key=lambda x: x.size)
    if largest.size <= MAX_ELEMENTS:
        return None
    return (
        f"an array of shape {largest.shape} has {largest.size:,} elements; offsets inside a "
        f"kernel end at {MAX_ELEMENTS:,}"
    )


def check_batches(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that refuses to be batched beyond what it can address.

    Under jax.vmap, ops see the shapes of one example, while the arrays of the kernel have the whole
    batch.

    Args:
      call: a kernel, a function of arrays.

    Returns:
      The same function; under jax.vmap it raises UnsupportedError where an array is too large.
    """

    @jax.custom_batching.custom_vmap
    def checked(*arrays):
        return call(*arrays)

    @checked.def_vmap
    def batched(axis_size, in_batched, *arrays):
        del axis_size
        axes = [0 if is_batched else None for is_batched in in_batched]
        out = check_batches(jax.vmap(call, axes))(*arrays)  # a vmap of the vmap is checked too
        reason = too_large(arrays, out)
        if reason is not None:
            raise UnsupportedError(f"under jax.vmap, {reason}")
        return out, jax.tree.map(lambda _: True, out)

    return checked
