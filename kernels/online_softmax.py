"""Softmax attention over keys that arrive block by block (Milakov and Gimelshein, 1805.02867).

After any number of blocks, for every row of queries and the keys s seen so far,

    maximum = max_s score[s]
    total   = sum_s exp(score[s] - maximum)
    summed  = sum_s exp(score[s] - maximum) v[s]

so that out = summed / total and lse = maximum + log(total). Everything is held in float32
(float64 for float64 inputs).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.precision import accumulator

# Below any real score, yet finite: a row that has seen no key yet rescales by exp(0), not exp(nan).
_LOWEST = -1e30
_MANY_ROWS = 16

State = tuple[
    Float[Array, "*batch rows"],
    Float[Array, "*batch rows"],
    Float[Array, "*batch rows head_dim"],
]


def start(q: Float[Array, "*batch rows head_dim"]) -> State:
    """Return the state before the first block."""
    wide = accumulator(q.dtype)
    return (
        jnp.full(q.shape[:-1], _LOWEST, wide),
        jnp.zeros(q.shape[:-1], wide),
        jnp.zeros(q.shape, wide),
    )


def add_block(
    state: State,
    q: Float[Array, "*batch rows head_dim"],
    k: Float[Array, "*batch block head_dim"],
    v: Float[Array, "*batch block head_dim"],
    mask: Bool[Array, "*#batch rows block"] | None,
    *,
    softmax_scale: float,
) -> State:
    """Let every row see the keys of one more block that its mask allows; None allows all."""
    maximum, total, summed = state
    batch = tuple(range(q.ndim - 2))
    scores = _product(q, k, maximum.dtype) * softmax_scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    seen = jax.lax.dot_general(
        weights.astype(v.dtype),
        v,
        (((q.ndim - 1,), (q.ndim - 2,)), (batch, batch)),
        preferred_element_type=maximum.dtype,
    )
    return (
        new_maximum,
        total * shrink + jnp.sum(weights, axis=-1),
        summed * shrink[..., None] + seen,
    )


def finish(
    state: State,
) -> tuple[Float[Array, "*batch rows head_dim"], Float[Array, "*batch rows"]]:
    """Return output and lse; a row that saw no key gets output 0 and lse -inf."""
    maximum, total, summed = state
    empty = total == 0
    out = summed / jnp.where(empty, 1, total)[..., None]
    return out, jnp.where(empty, -jnp.inf, maximum + jnp.log(jnp.where(empty, 1, total)))


def _product(q, k, dtype) -> Float[Array, "*batch rows block"]:
    """Return q k^T.

    XLA's CPU matmul is at its best with many rows: a few queries (decoding) go second, which is
    worth a quarter; many queries (prefill) go first, which saves the transposition, half the time.
    """
    batch = tuple(range(q.ndim - 2))
    dimensions = (((q.ndim - 1,), (q.ndim - 1,)), (batch, batch))
    if q.shape[-2] >= _MANY_ROWS:
        return jax.lax.dot_general(q, k, dimensions, preferred_element_type=dtype)
    return jnp.swapaxes(jax.lax.dot_general(k, q, dimensions, preferred_element_type=dtype), -1, -2)
