"""Sampling for rows that each have their own settings: one program, whatever they ask for.

Settings that no row uses cost nothing: what they need is in branches that are not taken. A row's
token depends on nothing but its own logits, settings and history; with equal settings it is the one
that duo_jax.serve.sampling draws.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key, UInt32

from duo_jax.serve import sampling
from duo_jax.serve.rows import token_logprobs
from kernels import pytree

Some = Array | np.ndarray  # numpy on the host, where rows come and go
Logits = Float[Array, "batch vocab"]


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How every row draws; a field has the value in brackets where a row does not use it."""

    temperature: Float[Some, " batch"]  # (0)
    top_k: Int[Some, " batch"]  # (0)
    top_p: Float[Some, " batch"]  # (1)
    min_p: Float[Some, " batch"]  # (0)
    repetition_penalty: Float[Some, " batch"]  # (1)
    presence_penalty: Float[Some, " batch"]  # (0)
    frequency_penalty: Float[Some, " batch"]  # (0)
    biased: Bool[Some, " batch"]  # logits have a bias (False)
    filtered: Bool[Some, " batch"]  # a grammar allows some tokens only (False)
    logprobs: Bool[Some, " batch"]  # log-probabilities are wanted (False)
    seed: UInt32[Some, " batch"]
    choice: Int[Some, " batch"]  # which of several texts with one seed
    position: Int[Some, " batch"]  # tokens before the one that is drawn


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowHistory:
    """What settings refer to, of every row of an engine."""

    seen: Bool[Array, "rows vocab"]  # tokens of prompt and answer
    written: Int32[Array, "rows vocab"]  # how often the answer has each token
    bias: Float[Array, "rows vocab"]

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "RowHistory":
        """Return the history of rows without any."""
        shape = (rows, vocab_size)
        return cls(
            seen=jnp.zeros(shape, bool),
            written=jnp.zeros(shape, jnp.int32),
            bias=jnp.zeros(shape, jnp.float32),
        )


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """The tokens drawn. Log-probabilities are the model's own; zeros where no row wants them."""

    tokens: Int[Array, " batch"]
    finite: Bool[Array, " batch"]  # all logits of the row
    logprobs: Float[Array, " batch"]
    top: Float[Array, "batch most"]
    top_tokens: Int[Array, "batch most"]


def no_settings(rows: int) -> RowSettings:
    """Return the settings of greedy rows, as numpy arrays to be written to."""
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    return RowSettings(
        temperature=zeros.copy(),
        top_k=np.zeros(rows, np.int32),
        top_p=ones.copy(),
        min_p=zeros.copy(),
        repetition_penalty=ones.copy(),
        presence_penalty=zeros.copy(),
        frequency_penalty=zeros.copy(),
        biased=np.zeros(rows, bool),
        filtered=np.zeros(rows, bool),
        logprobs=np.zeros(rows, bool),
        seed=np.zeros(rows, np.uint32),
        choice=np.zeros(rows, np.int32),
        position=np.zeros(rows, np.int32),
    )


@functools.partial(jax.jit, donate_argnames="history")
def begin_row(history: RowHistory, row: Int[Array, ""], new: RowHistory) -> RowHistory:
    """Give a row another history; `new` has one row."""

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis=0)

    return jax.tree.map(put, history, new)


@functools.partial(jax.jit, donate_argnames="history")
def move_row(history: RowHistory, source: Int[Array, ""], target: Int[Array, ""]) -> RowHistory:
    """Copy a row's history over another one's."""
    row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, source, 1, axis=0), history)
    return begin_row(history, target, row)


@functools.partial(jax.jit, static_argnames="most", donate_argnames="history")
def sample_rows(
    logits: Logits,
    history: RowHistory,
    first: Int[Array, ""],
    settings: RowSettings,
    active: Bool[Array, " batch"],
    allowed: Int32[Array, "batch words"],
    *,
    most: int,
) -> tuple[Sampled, RowHistory]:
    """Draw the next token of some rows.

    Args:
      logits: of the rows from `first` on.
      history: of all rows; donated.
      first: the first row.
      settings: of these rows.
      active: rows whose token counts.
      allowed: bits of the tokens that a grammar allows, where a row has one.
      most: how many of the most likely tokens are told, where log-probabilities are wanted.
    """
    batch = logits.shape[0]
    rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, batch, axis=0), history)
    s = settings
    penalised = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    changes = active & (penalised | s.biased | s.filtered)
    changed = functools.partial(_changed, rows=rows, settings=s, allowed=allowed)
    x = logits.astype(jnp.float32)
    x = jax.lax.cond(jnp.any(changes), changed, lambda x: x, x)
    greedy = jnp.argmax(x, axis=-1).astype(jnp.int32)
    draws = active & (s.temperature > 0)
    drawn = functools.partial(_drawn, s=s, active=active)
    tokens = jax.lax.cond(jnp.any(draws), drawn, lambda _: greedy, x)
    tokens = jnp.where(draws, tokens, greedy)

    def nothing(*_):
        zeros = jnp.zeros((batch, most), jnp.float32)
        return zeros[:, 0], zeros, zeros.astype(jnp.int32)

    def told(logits, tokens):
        logprob, top, which = token_logprobs(logits.astype(jnp.float32), tokens, most=most)
        return logprob, top, which.astype(jnp.int32)

    wanted = jnp.any(active & s.logprobs)
    logprobs, top, which = jax.lax.cond(wanted, told, nothing, logits, tokens)

    def remember(history: RowHistory) -> RowHistory:
        row = first + jnp.where(active, jnp.arange(batch), history.seen.shape[0])
        return dataclasses.replace(
            history,
            seen=history.seen.at[row, tokens].set(True, mode="drop"),
            written=history.written.at[row, tokens].add(1, mode="drop"),
        )

    history = jax.lax.cond(jnp.any(active & penalised), remember, lambda x: x, history)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    sampled = Sampled(tokens=tokens, finite=finite, logprobs=logprobs, top=top, top_tokens=which)
    return sampled, history


def _changed(
    x: Logits, *, rows: RowHistory, settings: RowSettings, allowed: Int32[Array, "batch words"]
) -> Logits:
    """Apply penalties, bias and grammar, in this order."""
    penalty = settings.repetition_penalty[:, None]
    x = jnp.where(rows.seen, jnp.where(x < 0, x * penalty, x / penalty), x)
    written = rows.written.astype(x.dtype)
    x = x - settings.presence_penalty[:, None] * jnp.minimum(written, 1)
    x = x - settings.frequency_penalty[:, None] * written
    x = x + jnp.where(settings.biased[:, None], rows.bias, 0)
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    ok = bits.reshape(x.shape[0], -1)[:, : x.shape[1]].astype(bool)
    return jnp.where(ok | ~settings.filtered[:, None], x, -jnp.inf)


def _drawn(x: Logits, *, s: RowSettings, active: Bool[Array, " batch"]) -> Int[Array, " batch"]:
    """Draw from the distributions that are left."""
    keys = jax.vmap(_key)(s.seed, s.choice, s.position)
    cut = active & (s.temperature > 0) & ((s.top_k > 0) | (s.top_p < 1))
    top_k = jnp.where(s.top_k > 0, s.top_k, x.shape[1])
    options = {
        "temperature": jnp.where(s.temperature > 0, s.temperature, 1),
        "min_p": s.min_p,
    }
    processed = jax.vmap(_processed)
    scores = jax.lax.cond(
        jnp.any(cut),
        lambda x: processed(x, options | {"top_k": top_k, "top_p": s.top_p}),
        lambda x: processed(x, options),
        x,
    )
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def _key(seed: Any, choice: Any, position: Any) -> Key[Array, ""]:
    """Return the key of a place of a text, as duo_jax.serve.decoding does for rows of a batch."""
    row = jax.random.fold_in(jax.random.key(seed), choice)
    return jax.random.fold_in(row, position)


def _processed(x: Float[Array, " vocab"], options: dict[str, Array]) -> Float[Array, " vocab"]:
    return sampling.processed_logits(x[None], options, None)[0]
