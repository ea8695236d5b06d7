"""Hard concrete masks: random numbers in [0, 1], mostly exactly 0 or 1, that have gradients.

    u ~ uniform(0, 1)
    mask = clip(-0.1 + 1.2 * sigmoid((log u - log(1 - u) + log_alpha) / temperature), 0, 1)
    P(mask = 0) = sigmoid(temperature * log(0.1 / 1.1) - log_alpha)

(Louizos et al. 2018, arXiv 1712.01312, section 2.2, with its temperature of 2/3.) A sigmoid that is
stretched beyond [0, 1] and cut off there gives 0 and 1 a probability of their own, and what lies
between, which is differentiable, becomes rare as log_alpha grows or falls.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_TEMPERATURE = 2 / 3
_LOWEST, _HIGHEST = -0.1, 1.1
_MARGIN = 1e-6  # of u from 0 and 1, where its logit is infinite


def sample(
    key: Key[Array, ""], log_alpha: Float[Array, "layers kv_heads"]
) -> Float[Array, "layers kv_heads"]:
    """Draw a mask for every head."""
    u = jax.random.uniform(
        key, log_alpha.shape, log_alpha.dtype, minval=_MARGIN, maxval=1 - _MARGIN
    )
    noise = jnp.log(u) - jnp.log1p(-u)
    stretched = jax.nn.sigmoid((noise + log_alpha) / _TEMPERATURE) * (_HIGHEST - _LOWEST) + _LOWEST
    return jnp.clip(stretched, 0.0, 1.0)


def probability_of_zero(
    log_alpha: Float[Array, "layers kv_heads"],
) -> Float[Array, "layers kv_heads"]:
    """Return how likely each head's mask is 0."""
    return jax.nn.sigmoid(_TEMPERATURE * math.log(-_LOWEST / _HIGHEST) - log_alpha)
