"""How likely a text is after a context, through the caches that serve.

The context is read in chunks up to its last tokens; these, and what follows, are decoded one by
one, since a streaming head keeps less while a model writes than a whole chunk could show it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duo_jax import cache as caches
from duo_jax import serve
from duo_jax.cache import Cache
from duo_jax.heads.split import DuoConfig
from duo_jax.model.llama import Params
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from kernels import Implementation

_SEGMENT = 64  # tokens of a row in one call: one program serves continuations of any length


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Memory of a live cache."""

    row_bytes: int  # of keys and values, measured on the device
    row_tokens: int  # tokens that a row has room for


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """How likely some continuations were."""

    logprobs: Float[np.ndarray, " rows"]  # natural logarithms
    greedy: Bool[np.ndarray, " rows"]  # every token was the likeliest one
    cache: CacheSize


def cache_size(session: Session) -> CacheSize:
    """Measure the live cache of a session."""
    return CacheSize(
        row_bytes=caches.live_bytes(session.cache) // session.batch_size,
        row_tokens=session.capacity,
    )


def read(
    runtime: Runtime, contexts: Sequence[list[int]], *, decode_last: int, room: int
) -> Session:
    """Read contexts, one per row, of any lengths.

    Args:
      runtime: the model.
      contexts: tokens; at least one each.
      decode_last: the last tokens of each, which are decoded one by one. The very first token is
        always read as a chunk.
      room: tokens for which the caches should have room beyond.

    Raises:
      InputError: as `Session.append`.
    """
    starts = [max(1, len(tokens) - decode_last) for tokens in contexts]
    session = Session(runtime, batch_size=len(contexts))
    tails = [tokens[start:] for tokens, start in zip(contexts, starts, strict=True)]
    heads = [tokens[:start] for tokens, start in zip(contexts, starts, strict=True)]
    session.append(heads, room=max(map(len, tails)) + room)
    # The session reads the last token itself, a chunk of one, which leaves it the logits.
    decoded = [tail[:-1] for tail in tails]
    if any(decoded):
        logits = session.ready(room=max(map(len, tails)) + room)
        counts = np.array([len(tail) for tail in decoded], np.int32)
        cache, *_ = _follow(runtime, session.take(), logits, decoded, counts)
        session.give_back(cache, decoded)
    session.append([tail[-1:] for tail in tails], room=room)
    return session


def score(
    runtime: Runtime,
    pairs: Sequence[tuple[Sequence[int], list[int]]],
    *,
    decode_last: int,
) -> Scores:
    """Score continuations; a context that several of them have is read once.

    Args:
      runtime: the model.
      pairs: tokens of a context, at least one, and tokens after it. The last one is only
        predicted, so that it needs no room in the cache.
      decode_last: as of `read`.

    Raises:
      InputError: as `Session.append`.
    """
    rows = [tokens for _, tokens in pairs]
    number: dict[tuple[int, ...], int] = {}
    of_context = [number.setdefault(tuple(context), len(number)) for context, _ in pairs]
    contexts = [list(context) for context in number]
    # Numbers of contexts are powers of two, so that few programs serve all batches.
    size = min(len(pairs), 1 << (len(contexts) - 1).bit_length())
    contexts += [contexts[0][:1]] * (size - len(contexts))

    fed = np.array([max(0, len(tokens) - 1) for tokens in rows], np.int32)
    session = read(runtime, contexts, decode_last=decode_last, room=int(fed.max()))
    logits = session.ready(room=int(fed.max()))
    cache = session.take()
    if of_context != list(range(size)):
        cache, logits = _rows(cache, logits, jnp.array(of_context, jnp.int32))
    measured = CacheSize(
        row_bytes=caches.live_bytes(cache) // len(rows), row_tokens=session.capacity
    )
    _, logprobs, greedy = _follow(runtime, cache, logits, rows, fed)
    return Scores(logprobs=logprobs, greedy=greedy, cache=measured)


def _follow(
    runtime: Runtime,
    cache: Cache,
    logits: Float[Array, "rows vocab"],
    rows: Sequence[list[int]],
    num_fed: Int[np.ndarray, " rows"],
) -> tuple[Cache, Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Score all tokens of every row, and append the first `num_fed` of each to the cache."""
    counts = np.array([len(row) for row in rows], np.int32)
    logprobs, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    for first in range(0, int(counts.max()), _SEGMENT):
        parts = [row[first : first + _SEGMENT] for row in rows]
        tokens = np.array([part + [0] * (_SEGMENT - len(part)) for part in parts], np.int32)
        cache, logits, logprob, likeliest = _segment(
            runtime.config,
            runtime.params,
            cache,
            logits,
            jnp.asarray(tokens),
            jnp.asarray(np.clip(counts - first, 0, _SEGMENT)),
            jnp.asarray(np.clip(num_fed - first, 0, _SEGMENT)),
            implementation=runtime.implementation,
        )
        logprobs += np.asarray(logprob, np.float64)
        greedy &= np.asarray(likeliest)
    return cache, logprobs, greedy


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def _segment(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    logits: Float[Array, "rows vocab"],
    tokens: Int[Array, "rows length"],
    num_scored: Int[Array, " rows"],
    num_fed: Int[Array, " rows"],
    *,
    implementation: Implementation,
) -> tuple[Cache, Float[Array, "rows vocab"], Float[Array, " rows"], Bool[Array, " rows"]]:
    """Score tokens given the logits before them, and decode them; both counts are per row.

    A row's num_scored is at most num_fed + 1.

    Returns:
      The cache, the logits after it, the sum of the log-probabilities, and whether every scored
      token was the likeliest.
    """

    def scored(t, logits, logprobs, greedy):
        logits, token = logits.astype(jnp.float32), tokens[:, t]
        counts = t < num_scored
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        likeliest = jnp.argmax(logits, axis=-1) == token
        return logprobs + jnp.where(counts, logprob, 0.0), greedy & (likeliest | ~counts)

    def step(t, carry):
        cache, logits, *marks = carry
        marks = scored(t, logits, *marks)
        fed = t < num_fed
        new, cache = serve.decode(
            config, params, cache, tokens[:, t], fed, implementation=implementation
        )
        return cache, jnp.where(fed[:, None], new, logits), *marks

    batch = tokens.shape[0]
    nothing = (jnp.zeros(batch, jnp.float32), jnp.ones(batch, bool))
    steps = jnp.max(num_fed)
    cache, logits, *marks = jax.lax.fori_loop(0, steps, step, (cache, logits, *nothing))
    # The last tokens of the longest rows are scored, not decoded.
    logprobs, greedy = scored(steps, logits, *marks)
    return cache, logits, logprobs, greedy


@jax.jit
def _rows(
    cache: Cache, logits: Float[Array, "contexts vocab"], index: Int[Array, " rows"]
) -> tuple[Cache, Float[Array, "rows vocab"]]:
    """Copy rows: every array of a cache begins with the batch."""
    return jax.tree.map(lambda leaf: leaf[index], (cache, logits))
