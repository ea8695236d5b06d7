"""Writing on from what a session has read, one segment of the decode loop at a time."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from duo_jax.errors import InputError
from duo_jax.serve import decoding
from duo_jax.serve.sampling import SamplingConfig, check_seed
from duo_jax.session.detokenize import Detokenizer
from duo_jax.session.session import Session
from duo_jax.session.tokenization import Tokenization

SEGMENT = 64  # tokens decoded before the host looks: for Ctrl-C, and for rows that it ends
_SEGMENT_SECONDS = 0.05  # how far text may lag behind when it is streamed


def write_tokens(
    session: Session,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    segment: int | None = SEGMENT,
    ended: set[int] | None = None,
) -> Iterator[list[list[int]]]:
    """Continue every row of a session; yield the new tokens of every row, some at a time.

    What was yielded belongs to the session. A row ends after `max_new_tokens`, where the model's
    range or the cache's size ends, with a stop token (which is yielded), or when the caller adds
    its number to `ended`.

    Args:
      session: has read something.
      max_new_tokens: most new tokens per row.
      sampling: how tokens are drawn; default greedy.
      stop_tokens: tokens that end a row.
      seed: of the random draws.
      segment: most tokens per row between two yields; None: as many as take about 50 ms.
      ended: rows that the caller ends, between two yields.

    Raises:
      InputError: there is nothing to continue, or no room for a single new token.
    """
    if not 1 <= max_new_tokens < 2**31:
        raise InputError(f"max_new_tokens {max_new_tokens} is not from 1 to 2^31")
    check_seed(seed)
    turn = session.begin_turn()
    most = np.minimum(max_new_tokens, session.room())
    options = (sampling or SamplingConfig()).options()
    stops = jnp.array(tuple(stop_tokens), jnp.int32)
    logits = session.ready(room=max_new_tokens)
    with session.timing.decode():
        state = decoding.begin(
            session.take(),
            logits,
            decoding.row_rng_keys(seed, session.batch_size),
            jnp.asarray(_seen(session)) if "repetition_penalty" in options else None,
            options,
            stops,
        )
        new = [[token] for token in np.asarray(state.last).tolist()]
    counts = np.ones(session.batch_size, int)
    size = min(segment or 1, SEGMENT)
    while True:
        session.give_back(state.cache, new)
        yield new
        session.check_turn(turn)
        stopped = np.array(state.stopped)
        stopped[list(ended or ())] = True
        limits = np.where(stopped, 0, np.minimum(most - counts, size))
        if not limits.any():
            return
        before = session.timing.decode_seconds
        with session.timing.decode():
            session.take()  # donated with the state
            state, tokens, num = decoding.decode_segment(
                session.runtime.config,
                session.runtime.params,
                dataclasses.replace(state, stopped=jnp.asarray(stopped)),
                options,
                stops,
                jnp.asarray(limits, jnp.int32),
                capacity=SEGMENT,
                implementation=session.runtime.implementation,
            )
            num = np.asarray(num)
            new = [row[:n].tolist() for row, n in zip(np.asarray(tokens), num, strict=True)]
        counts += num
        if segment is None:
            seconds = (session.timing.decode_seconds - before) / num.max()
            size = int(np.clip(_SEGMENT_SECONDS / max(seconds, 1e-6), 1, SEGMENT))


def write_text(
    session: Session,
    tokenization: Tokenization,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str],
    seed: int,
    sampling: SamplingConfig,
    segment: int | None,
    continues: bool = True,
) -> Iterator[list[str]]:
    """Continue all rows of a session; yield the new text of every row, some at a time.

    Args:
      session: has read something.
      tokenization: its model's; the tokens with which it ends a text are not yielded.
      max_new_tokens: most tokens per row.
      stop: string or strings that end a row, just before them.
      seed: of the random draws.
      sampling: how tokens are drawn.
      segment: as in `write_tokens`; with stop strings it is one token, so that nothing after one
        gets into the cache.
      continues: the text goes on where the row ends, with a space between words; otherwise, as in
        a chat, it is a text of its own.

    Raises:
      InputError: as `write_tokens`.
    """
    if isinstance(stop, str):
        stop = (stop,) if stop else ()
    rows = [
        Detokenizer(tokenization.tokenizer, context=tokens if continues else (), stop=stop)
        for tokens in session.tokens
    ]
    ended: set[int] = set()
    for new in write_tokens(
        session,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=tokenization.stop_tokens,
        seed=seed,
        segment=1 if stop else segment,
        ended=ended,
    ):
        pieces = []
        for index, (row, tokens) in enumerate(zip(rows, new, strict=True)):
            stops = bool(tokens) and tokens[-1] in tokenization.stop_tokens
            pieces.append(row.push(tokens[:-1] if stops else tokens))
            if row.stopped:
                ended.add(index)
        yield pieces
    yield [row.finish() for row in rows]


def _seen(session: Session) -> np.ndarray:
    """Return which tokens of the vocabulary occur in each row."""
    seen = np.zeros((session.batch_size, session.runtime.config.architecture.vocab_size), bool)
    for marks, row in zip(seen, session.tokens, strict=True):
        marks[row] = True
    return seen
