"""Attention over parts of the keys, merged into attention over all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.precision import accumulator


def merge_lse(
    outs: Float[Array, "parts *rows head_dim"], lses: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows head_dim"], Float[Array, "*rows"]]:
    """Merge the outputs of attention over disjoint parts of the keys (flash-decoding).

        lse = log(sum_p exp(lses[p])),  out = sum_p exp(lses[p] - lse) outs[p]

    Args:
      outs: attention output of every part.
      lses: its logarithm of the sum of exponentials, natural; -inf where a part saw no key.

    Returns:
      Output and lse over all keys; 0 and -inf where no part saw a key. The output has the dtype of
      `outs`, the lse is float32 (float64 for float64).
    """
    wide = accumulator(outs.dtype)
    lses = lses.astype(wide)
    highest = jnp.max(lses, axis=0, keepdims=True)
    highest = jnp.where(jnp.isneginf(highest), 0, highest)
    weights = jnp.exp(lses - highest)
    total = jnp.sum(weights, axis=0)
    summed = jnp.sum(weights[..., None] * outs.astype(wide), axis=0)
    out = summed / jnp.where(total == 0, 1, total)[..., None]
    return out.astype(outs.dtype), highest[0] + jnp.log(total)
