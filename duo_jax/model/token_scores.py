"""How a model predicts given tokens, and how far its distributions are from another model's.

All in nats, in float32, from logits in the model's own dtype, as it is served. Logits of all places
together would take gigabytes with a large vocabulary; residual streams are scored a few places at a
time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.errors import InputError
from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import pytree
from kernels.precision import accumulator

_PLACES = 64  # per row, whose logits exist at a time


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What a model makes of tokens, each after the true ones before it."""

    predicted: Int[Array, "*places"]  # the most likely token
    nll: Float[Array, "*places"]  # minus the log-probability of the true one
    kl: Float[Array, "*places"] | None  # KL(reference || model), where there is a reference


def score_logits(
    logits: Float[Array, "*places vocab"],
    tokens: Int[Array, "*places"],
    reference: Float[Array, "*places vocab"] | None = None,
) -> TokenScores:
    """Score tokens.

    Args:
      logits: the model's, at the place of each token.
      tokens: the true ones.
      reference: logits of the model to compare with.
    """
    wide = accumulator(logits.dtype)
    log_p = jax.nn.log_softmax(logits.astype(wide))
    kl = None
    if reference is not None:
        log_r = jax.nn.log_softmax(reference.astype(wide))
        kl = jnp.maximum(jnp.sum(jnp.exp(log_r) * (log_r - log_p), axis=-1), 0)  # but for rounding
    return TokenScores(
        predicted=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        nll=-jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0],
        kl=kl,
    )


@functools.partial(jax.jit, static_argnames="architecture")
def score_streams(
    architecture: ModelConfig,
    params: llama.Params,
    x: Float[Array, "batch length embed"],
    tokens: Int[Array, "batch length"],
    reference: Float[Array, "batch length embed"] | None = None,
) -> TokenScores:
    """Score tokens by the residual streams that predict them.

    Args:
      architecture: the model.
      params: its parameters; those of the layers are not read and may have any form.
      x: residual streams after the last layer, at the place before each token.
      tokens: the true ones.
      reference: streams of the model to compare with, which shares norm and output projection.
    """
    ends = {name: part for name, part in params.items() if name != "layers"}
    batch, length = tokens.shape
    size = max(1, min(_PLACES, length))
    padding = -length % size
    parts = length // size + (padding > 0)

    def in_parts(leaf: Array) -> Array:
        wide = jnp.pad(leaf, ((0, 0), (0, padding), *((0, 0),) * (leaf.ndim - 2)))
        return jnp.moveaxis(wide.reshape(batch, parts, size, *leaf.shape[2:]), 1, 0)

    def one_part(part: tuple[Array, Array, Array | None]) -> TokenScores:
        x, tokens, reference = part
        known = None if reference is None else llama.logits(architecture, ends, reference)
        return score_logits(llama.logits(architecture, ends, x), tokens, known)

    found = jax.lax.map(one_part, jax.tree.map(in_parts, (x, tokens, reference)))
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(batch, parts * size)[:, :length], found
    )


def check_finite(nll: Float[np.ndarray, "*places"]) -> None:
    """Refuse likelihoods that are no numbers.

    Raises:
      InputError: one is not finite.
    """
    if not np.isfinite(nll).all():
        raise InputError(
            "the model's logits are not finite; if it is float16 or bfloat16, try --dtype float32"
        )
