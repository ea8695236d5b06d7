"""Merging through XLA: the oracle, and what runs unless the kernel is asked for."""

import jax.numpy as jnp
from jaxtyping import Array, Float

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
    out = summed / jnp.where(total == 0, 1, total)[..., None]
    return out.astype(outs.dtype), highest[0] + jnp.log(total)
