"""Softmax attention over keys that arrive block by block (Milakov and Gimelshein, 1805.02867).

After any number of blocks, for every row of queries and the keys s seen so far,

    maximum = max_s score[s]
    total   = sum_s exp(score[s] - maximum)
    summed  = sum_s exp(score[s] - maximum) v[s]

so that out = summed / total and lse = maximum + log(total). Everything is held in float32
(float64 for float64 inputs). Kernels that hold `summed` in another form share `start_rows`,
`rescale` and `finish_rows`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
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
    return *start_rows(q.shape[:-1], wide), jnp.zeros(q.shape, wide)


def start_rows(
    shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the maximum and the total before the first block."""
    return jnp.full(shape, _LOWEST, dtype), jnp.zeros(shape, dtype)


def rescale(
    maximum: Float[Array, "*rows"], block_maximum: Float[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the maximum after one more block, and the factor on all sums before it."""
    new_maximum = jnp.maximum(maximum, block_maximum)
    return new_maximum, jnp.exp(maximum - new_maximum)


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
    scores = _product(q, k, maximum.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    # Scaled where they are used: XLA's CPU programs would write scaled scores down for both uses.
    maximum, shrink = rescale(maximum, jnp.max(scores, axis=-1) * softmax_scale)
    weights = jnp.exp(scores * softmax_scale - maximum[..., None])
    seen = jax.lax.dot_general(
        weights.astype(v.dtype),
        v,
        (((q.ndim - 1,), (q.ndim - 2,)), (batch, batch)),
        preferred_element_type=maximum.dtype,
    )
    return (
        maximum,
        total * shrink + jnp.sum(weights, axis=-1),
        summed * shrink[..., None] + seen,
    )


def finish(
    state: State,
) -> tuple[Float[Array, "*batch rows head_dim"], Float[Array, "*batch rows"]]:
    """Return output and lse; a row that saw no key gets output 0 and lse -inf."""
    maximum, total, summed = state
    divisor, lse = finish_rows(maximum, total)
    return summed / divisor[..., None], lse


def finish_rows(
    maximum: Float[Array, "*rows"], total: Float[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return what the sums are divided by, and lse; 1 and -inf for a row that saw no key."""
    empty = total == 0
    divisor = jnp.where(empty, 1, total)
    return divisor, jnp.where(empty, -jnp.inf, maximum + jnp.log(divisor))


def _product(
    q: Float[Array, "*batch rows head_dim"],
    k: Float[Array, "*batch block head_dim"],
    dtype: DTypeLike,
) -> Float[Array, "*batch rows block"]:
    """Return q k^T.

    XLA's CPU matmul is fastest with many rows. A few queries (decoding) go second, which saves a
    quarter of the time; many queries (prefill) go first, which saves the transposition, half the
    time.
    """
    batch = tuple(range(q.ndim - 2))
    dimensions = (((q.ndim - 1,), (q.ndim - 1,)), (batch, batch))
    if q.shape[-2] >= _MANY_ROWS:
        return jax.lax.dot_general(q, k, dimensions, preferred_element_type=dtype)
    return jnp.swapaxes(jax.lax.dot_general(k, q, dimensions, preferred_element_type=dtype), -1, -2)
