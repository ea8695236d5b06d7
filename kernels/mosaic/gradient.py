"""Gradients of what a Mosaic kernel computes, by another implementation."""

from collections.abc import Callable
from typing import Any

import jax

from kernels import compat

NO_GRADIENT = (
    "the Mosaic kernels have no gradients; implementation='triton' and 'xla' have, and "
    "'auto' takes one of these"
)


def for_auto(
    kernel: Callable[..., Any], *, triton: Callable[..., Any], xla: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a kernel with the gradient that "auto" gives it; asked for by name it refuses one."""
    return by(xla, kernel) if compat.no_triton() is not None else instead(triton, kernel)


def instead(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes as a kernel does, and all as a reference for a gradient.

    The reference runs forward once, where `by` runs it in the backward pass, after the kernel.
    """

    @jax.custom_vjp
    def attend(*arrays):
        return kernel(*arrays)

    def forward(*arrays):
        return jax.vjp(reference, *arrays)

    def backward(pull_back, cotangents):
        return pull_back(cotangents)

    attend.defvjp(forward, backward)
    return attend


def by(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays that computes as a kernel does, and has a reference's gradient.

    Between the two passes only the arrays are kept.
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
