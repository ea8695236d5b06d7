"""Sampling the next token: a user's settings, and one pure function that follows them.

Settings enter compiled code as scalars. Only which of them are switched on decides what is
compiled, so another temperature needs no new program.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from msgspec import Meta

from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import argument, check_fields, field_kinds
from duo_jax.schema.kinds import Fraction, Seed

_LARGEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, in the terms of transformers."""

    temperature: Annotated[float, Meta(ge=0.0)] = 0.0
    """0 always takes the most probable token; 1 draws from the model's own probabilities; higher
    values, without a limit, make rare tokens more likely."""
    top_k: Annotated[int, Meta(ge=0)] | None = None
    """Keep only the k most probable tokens; 0 or not given: all of them."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    """Keep only the most probable tokens whose probabilities add up to this, above 0; 1: all."""
    min_p: Fraction | None = None
    """Keep only tokens with at least this share, 0 to 1, of the highest probability."""
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    """Above 1, tokens that already occurred, in the prompt or the answer, become less likely; below
    1, more likely; 1: no change."""

    def __post_init__(self) -> None:
        check_fields(self)

    def options(self) -> dict[str, Array]:
        """Return the options that are switched on, as scalars for `sample`.

        None switches an option off, and so does the value that changes nothing: 1 for top_p and
        repetition_penalty, 0 for min_p and top_k. At temperature 0 the most probable token survives
        top_k, top_p and min_p, so these are off as well.
        """
        on = {}
        if self.repetition_penalty not in (None, 1.0):
            on["repetition_penalty"] = _positive(self.repetition_penalty)
        if self.temperature > 0.0:
            on["temperature"] = _positive(self.temperature)
            if self.top_k not in (None, 0):
                on["top_k"] = jnp.asarray(min(self.top_k, _LARGEST_INT), jnp.int32)
            if self.top_p not in (None, 1.0):
                on["top_p"] = _positive(self.top_p)
            if self.min_p not in (None, 0.0):
                on["min_p"] = _positive(self.min_p)
        return on


def sampling_config(settings: Mapping[str, Any]) -> SamplingConfig:
    """Return a SamplingConfig of named settings, as methods take them beside their own arguments.

    Raises:
      InputError: there is no such setting, or its value cannot be used.
    """
    known = field_kinds(SamplingConfig)
    for name in settings:
        if name not in known:
            raise InputError(f"there is no setting {quoted(name)}; of sampling: {', '.join(known)}")
    return SamplingConfig(**settings)


def check_seed(seed: int) -> None:
    """Refuse a seed that jax would cut to 32 bits.

    Raises:
      InputError: with the seed.
    """
    argument("seed", seed, Seed)


def sample(
    logits: Float[Array, "batch vocab"],
    options: Mapping[str, Array],
    rng_keys: Key[Array, " batch"],
    seen: Bool[Array, "batch vocab"] | None,
) -> Int[Array, " batch"]:
    """Choose the next token of every row.

    Without a temperature this is the most probable token (the first of several), with it a draw
    from softmax(processed_logits). A row's token depends only on that row's logits, key and seen
    tokens.

    Args:
      logits: any floating dtype; a row without finite logits gives a valid token too.
      options: from SamplingConfig.options.
      rng_keys: one typed key per row; not used without a temperature.
      seen: as in `processed_logits`.
    """
    scores = processed_logits(logits, options, seen)
    if "temperature" not in options:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(rng_keys, scores).astype(jnp.int32)


def processed_logits(
    logits: Float[Array, "batch vocab"],
    options: Mapping[str, Array],
    seen: Bool[Array, "batch vocab"] | None,
) -> Float[Array, "batch vocab"]:
    """Return the float32 logits to draw from; tokens that are ruled out get -inf.

    The order is that of transformers: repetition_penalty (a seen token's logit is divided by it if
    positive, multiplied if negative), temperature, top_k, top_p, min_p; the last two look at the
    probabilities of what is left. With a temperature, rows are shifted to a maximum of 0: no
    probability changes, and dividing by a tiny temperature cannot overflow.

    Ties: tokens equal to the last one that top_k or top_p keeps are all kept. transformers does so
    for top_k; for top_p it keeps those that its unstable sort puts first.

    Args:
      logits: any floating dtype.
      options: from SamplingConfig.options.
      seen: tokens of the prompt and of the output so far (see `mark_seen`); may be None
        unless there is a repetition_penalty.
    """
    x = logits.astype(jnp.float32)
    if "repetition_penalty" in options:
        if seen is None:
            raise ValueError("repetition_penalty needs the seen tokens")
        penalty = options["repetition_penalty"]
        x = jnp.where(seen, jnp.where(x < 0, x * penalty, x / penalty), x)
    if "temperature" not in options:
        return x
    x = jnp.minimum(x, jnp.finfo(jnp.float32).max)  # inf - inf below would be NaN
    largest = jnp.max(x, axis=-1, keepdims=True)
    x = (x - jnp.where(largest == -jnp.inf, 0.0, largest)) / options["temperature"]
    if "top_k" in options or "top_p" in options:
        x = jnp.where(x < _smallest_kept(x, options), -jnp.inf, x)
    if "min_p" in options:  # the maximum is 0, so exp gives the ratio to the most probable token
        x = jnp.where(jnp.exp(x) < options["min_p"], -jnp.inf, x)
    return x


def seen_tokens(rows: Sequence[Sequence[int]], vocab_size: int) -> Bool[Array, "batch vocab"]:
    """Return which tokens of the vocabulary occur in each row."""
    seen = np.zeros((len(rows), vocab_size), bool)
    for marks, row in zip(seen, rows, strict=True):
        marks[list(row)] = True
    return jnp.asarray(seen)


def mark_seen(
    seen: Bool[Array, "batch vocab"],
    tokens: Int[Array, "batch length"],
    valid: Bool[Array, "batch length"],
) -> Bool[Array, "batch vocab"]:
    """Set seen[b, tokens[b, t]] wherever valid[b, t].

    Padding may hold any number; valid tokens outside the vocabulary are ignored.
    """
    batch, vocab = seen.shape
    columns = jnp.where(valid & (tokens >= 0), tokens, vocab)  # a negative index would wrap
    return seen.at[jnp.arange(batch)[:, None], columns].set(True, mode="drop")


def _smallest_kept(
    x: Float[Array, "batch vocab"], options: Mapping[str, Array]
) -> Float[Array, "batch 1"]:
    """Return the smallest logit of each row that top_k, then top_p, keeps."""
    vocab = x.shape[-1]
    ascending = jnp.sort(x, axis=-1)
    kept = ascending[:, :1]
    if "top_k" in options:
        rank = vocab - jnp.minimum(options["top_k"], vocab)
        kept = jax.lax.dynamic_slice_in_dim(ascending, rank, 1, axis=1)
    if "top_p" in options:
        # Summed upwards from the least likely, where float32 is finest, as transformers does.
        left = jnp.where(ascending < kept, -jnp.inf, ascending)
        removed = jnp.cumsum(jax.nn.softmax(left, axis=-1), axis=-1) <= 1.0 - options["top_p"]
        first = jnp.minimum(jnp.sum(removed, axis=-1, keepdims=True), vocab - 1)
        kept = jnp.take_along_axis(ascending, first, axis=-1)
    return kept


def _positive(value: float) -> Float[Array, ""]:
    """Clip a positive number so that it and its reciprocal are normal numbers in float32."""
    return jnp.asarray(min(max(value, 1e-37), 1e37), jnp.float32)
