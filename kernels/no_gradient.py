"""Refusal of derivatives that kernels do not have.

Without it, jax differentiates the inside of a kernel and fails there, with an empty message.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

from kernels.errors import UnsupportedError

Result = TypeVar("Result")


def refuse_gradient(function: Callable[..., Result], reason: str) -> Callable[..., Result]:
    """Return a function that computes the same and refuses to be differentiated.

    Only derivatives with respect to its arguments are noticed, so all arrays that it uses must be
    arguments (trees of arrays, by position); everything else is bound beforehand. Arguments that
    are not differentiated, as under jax.lax.stop_gradient, pass through every transformation.

    Args:
      function: of trees of arrays.
      reason: the message of the error, in one line.

    Returns:
      The function, whose derivatives of any kind raise UnsupportedError with the reason.
    """

    @jax.custom_jvp
    def refusing(*arrays):
        return function(*arrays)

    @refusing.defjvp
    def refuse(primals, tangents):
        del primals, tangents
        raise UnsupportedError(reason)

    return refusing
