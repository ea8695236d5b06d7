"""A case as calls of an ordinary attention function, to compare with other libraries."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class UnsuitableError(Exception):
    """Another library cannot do a case; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an attention function on arrays [batch, length, heads, head_dim]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    causal: bool
    window: int | None = None  # tokens that a query sees, its own included; None: all
    d_out: jax.Array | None = None  # gradients are wanted too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equivalent:
    """Calls that together do the work of a case, and how they differ from it."""

    calls: list[Call]
    note: str = ""


def tokens_first(
    x: Float[Array, "batch kv_heads slots head_dim"],
) -> Float[Array, "batch slots kv_heads head_dim"]:
    """Return part of a cache in the layout of other libraries, computed before it is timed."""
    return jax.block_until_ready(jnp.swapaxes(x, 1, 2))
