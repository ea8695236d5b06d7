"""Gradients of what a Mosaic kernel computes, by another implementation."""

from collections.abc import Callable
from typing import Any

import jax

NO_GRADIENT = (
    "the Mosaic kernels have no gradients; implementation='triton' and 'xla' have, and "
    "'auto' takes one of these"
)


def by(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays that computes as a kernel does, and has a reference's gradient.

    "auto" takes it, which may choose; a kernel that is asked for by name refuses gradients.
    """

    @jax.custom_vjp
    def attend(*arrays):
        return kernel(*arrays)

    def forward(*arrays):
        return kernel(*arrays), arrays

    def backward(arrays, cotangents):
        return jax.vjp(reference, *arrays)[1](cotangents)

    attend.defvjp(forward, backward)
    return attend
