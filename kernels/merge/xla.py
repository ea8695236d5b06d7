"""Merging through XLA: the reference, and the default."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import online_softmax
from kernels.precision import accumulator


def merge_lse(
    outs: Float[Array, "parts *rows head_dim"], lses: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """See kernels.merge_lse."""
    wide = accumulator(outs.dtype)
    lses = lses.astype(wide)
    highest = jnp.max(lses, axis=0, keepdims=True)
    highest = jnp.where(jnp.isneginf(highest), 0, highest)
    weights = jnp.exp(lses - highest)
    total = jnp.sum(weights, axis=0)
    summed = jnp.sum(weights[..., None] * outs.astype(wide), axis=0)
    divisor, lse = online_softmax.finish_rows(highest[0], total)
    return (summed / divisor[..., None]).astype(outs.dtype), lse
