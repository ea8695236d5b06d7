"""The largest array that a Triton kernel can address."""

from collections.abc import Callable
from typing import Any

import jax

from kernels.errors import UnsupportedError

# Offsets inside a Triton kernel are 32-bit element counts, even from 64-bit indices: beyond this
# they wrap around silently.
MAX_ELEMENTS = 2**31 - 1


def too_large(*trees: Any) -> str | None:
    """Return that the largest array of some trees has more elements than that, or None."""
    largest = max(jax.tree.leaves(trees), key=lambda x: x.size)
    if largest.size <= MAX_ELEMENTS:
        return None
    return (
        f"an array of shape {largest.shape} has {largest.size:,} elements; offsets inside a "
        f"kernel end at {MAX_ELEMENTS:,}"
    )


def check_batches(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays that refuses to be batched beyond what kernels can address.

    Ops look at the shapes that they are given. Those are of one example under jax.vmap, which adds
    the batch to the arrays of the kernel.

    Args:
      call: a kernel.

    Returns:
      The same function; under jax.vmap it may raise UnsupportedError, with the reason.
    """

    @jax.custom_batching.custom_vmap
    def checked(*arrays):
        return call(*arrays)

    @checked.def_vmap
    def batched(axis_size, in_batched, *arrays):
        del axis_size
        axes = [0 if is_batched else None for is_batched in in_batched]
        out = check_batches(jax.vmap(call, axes))(*arrays)  # they may be batched once more
        reason = too_large(arrays, out)
        if reason is not None:
            raise UnsupportedError(f"under jax.vmap, {reason}")
        return out, jax.tree.map(lambda _: True, out)

    return checked
