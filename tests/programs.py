"""What a traced program is made of."""

from collections.abc import Iterator
from typing import Any

import jax


def operations(jaxpr: Any) -> Iterator[str]:
    """Yield the names of all operations of a jaxpr, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(inner):
                yield from operations(getattr(inner, "jaxpr", inner))


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
