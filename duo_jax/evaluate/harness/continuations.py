"""Log-likelihoods of continuations, from the caches that serve a split model.

A context is read in chunks up to its last tokens. These, and the continuation, are decoded one by
one, because during generation a streaming head keeps less than a whole chunk would show it.
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
from duo_jax.serve.teacher_forcing import decode_given
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
    """Scores of some continuations."""

    logprobs: Float[np.ndarray, " rows"]  # natural logarithms
    greedy: Bool[np.ndarray, " rows"]  # every token was the most likely one
    cache: CacheSize


def cache_size(session: Session) -> CacheSize:
    """Measure the live cache of a session that has read something."""
    assert session.cache is not None
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
      contexts: their tokens, at least one each.
      decode_last: how many of the last tokens are decoded one by one. The very first token is
        always read as a chunk, and so is all of the text where tokens are evicted after it.
      room: further tokens that the caches have room for.

    Raises:
      InputError: as `Session.append`.
    """
    if runtime.keep < 1:  # tokens are evicted once all is read, as the end of the text votes
        decode_last = 0
    starts = [max(1, len(tokens) - decode_last) for tokens in contexts]
    session = Session(runtime, batch_size=len(contexts))
    tails = [tokens[start:] for tokens, start in zip(contexts, starts, strict=True)]
    heads = [tokens[:start] for tokens, start in zip(contexts, starts, strict=True)]
    session.append(heads, room=max(map(len, tails)) + room)
    # The session reads the last token itself, a chunk of one, which leaves it the logits.
    decoded = [tail[:-1] for tail in tails]
    if any(decoded):
        with session.borrowed(room=max(map(len, tails)) + room) as loan:
            loan.cache, *_ = _follow(runtime, loan.take(), tails)
            loan.tokens = decoded
    session.append([tail[-1:] for tail in tails], room=room)
    return session


def score(
    runtime: Runtime,
    pairs: Sequence[tuple[Sequence[int], list[int]]],
    *,
    decode_last: int,
) -> Scores:
    """Score continuations; a context that several of them share is read once.

    Args:
      runtime: the model.
      pairs: tokens of a context, at least one, and of its continuation, whose last token is only
        predicted and needs no room in the cache.
      decode_last: as in `read`.

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

    room = max(0, max(map(len, rows)) - 1)
    session = read(runtime, contexts, decode_last=decode_last, room=room)
    with session.borrowed(room=room) as loan:
        cache, logits = loan.take(), loan.logits
    if of_context != list(range(size)):
        cache, logits = _rows(cache, logits, jnp.array(of_context, jnp.int32))
    measured = CacheSize(
        row_bytes=caches.live_bytes(cache) // len(rows), row_tokens=session.capacity
    )
    first, most_likely = _score(logits, jnp.array([row[0] if row else 0 for row in rows]))
    _, logprobs, greedy = _follow(runtime, cache, rows)
    some = np.array([len(row) > 0 for row in rows])
    logprobs += np.where(some, np.asarray(first, np.float64), 0)
    greedy &= np.asarray(most_likely) | ~some
    return Scores(logprobs=logprobs, greedy=greedy, cache=measured)


def _follow(
    runtime: Runtime, cache: Cache, rows: Sequence[list[int]]
) -> tuple[Cache, Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Decode all tokens of every row but the last; score all but the first.

    Returns:
      The cache, the log-probability of each row's tokens together, and whether every one of them
      was the most likely one.
    """
    counts = np.array([max(0, len(row) - 1) for row in rows], np.int32)
    logprobs, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
    for first in range(0, int(counts.max()), _SEGMENT):
        parts = [row[first : first + _SEGMENT + 1] for row in rows]
        tokens = np.array([part + [0] * (_SEGMENT + 1 - len(part)) for part in parts], np.int32)
        active = np.arange(_SEGMENT) < (counts - first)[:, None]
        (logprob, most_likely), cache = _segment(
            runtime.config,
            runtime.params,
            cache,
            jnp.asarray(tokens[:, :-1]),
            jnp.asarray(tokens[:, 1:]),
            jnp.asarray(active),
            implementation=runtime.implementation,
        )
        logprobs += np.sum(np.asarray(logprob, np.float64), axis=1, where=active)
        greedy &= np.all(np.asarray(most_likely), axis=1, where=active)
    return cache, logprobs, greedy


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def _segment(
    config: DuoConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "rows length"],
    targets: Int[Array, "rows length"],
    active: Bool[Array, "rows length"],
    *,
    implementation: Implementation,
) -> tuple[tuple[Float[Array, "rows length"], Bool[Array, "rows length"]], Cache]:
    """Decode the active tokens; score the target after each."""

    def step(
        cache: Cache, tokens: Int[Array, " rows"], active: Bool[Array, " rows"]
    ) -> tuple[Float[Array, "rows vocab"], Cache]:
        return serve.decode(config, params, cache, tokens, active, implementation=implementation)

    return decode_given(
        step, cache, tokens, active, keep=lambda logits, t: _score(logits, targets[:, t])
    )


@jax.jit
def _score(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Return each token's log-probability, and whether it is the most likely token."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logprobs, jnp.argmax(logits, axis=-1) == tokens


@jax.jit
def _rows(
    cache: Cache, logits: Float[Array, "contexts vocab"], index: Int[Array, " rows"]
) -> tuple[Cache, Float[Array, "rows vocab"]]:
    """Copy rows: every array of a cache begins with the batch."""
    return jax.tree.map(lambda leaf: leaf[index], (cache, logits))
