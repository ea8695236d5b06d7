"""Answers by teacher forcing: what a model makes of tails of texts, each token after the true ones.

    forced, cache_bytes = force(session, tails, room=longest)
    scores = score(runtime, forced, tails, reference=forced_of_full_caches)

`session` has read the texts. What is kept of a pass are residual streams, not logits: a text's take
kilobytes per token, also with a large vocabulary, so those of full caches can be kept as the
reference of others.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.cache import live_bytes, mark, rewind
from duo_jax.evaluate.results import grid
from duo_jax.model.token_scores import check_finite, score_logits, score_streams
from duo_jax.serve.teacher_forcing import decode_tokens
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session

Tokens = Int[np.ndarray, "_"]
Spans = Sequence[tuple[int, int]]  # (start, stop) of each answer in a tail


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Forced:
    """What predicts each token of the tails."""

    first: Float[np.ndarray, "batch vocab"]  # logits of the first token
    rest: Float[np.ndarray, "batch rest embed"]  # residual stream before each later one


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TailScores:
    """Scores of every token of the tails; those beyond a tail's end mean nothing."""

    predicted: Int[np.ndarray, "batch tail"]  # the most likely token
    nll: Float[np.ndarray, "batch tail"]  # nats
    kl: Float[np.ndarray, "batch tail"] | None  # KL(reference || model), nats


def force(
    session: Session, tails: Sequence[Tokens], *, room: int, go_on: bool = False
) -> tuple[Forced, int]:
    """Decode tails from the caches of a session that has read what is before them.

    Args:
      session: its rows.
      tails: the tokens after each row.
      room: to pad tails to; another number is another compilation.
      go_on: leave the session as it was; otherwise it has used its cache up.

    Returns:
      What predicts the tails, and the bytes of a row's cache.
    """
    runtime = session.runtime
    given, counts = pad(tails, room)
    # The last token of a tail is predicted, not given.
    active = jnp.arange(room)[None, :] < counts[:, None] - 1
    with session.borrowed(room=room) as loan:
        first, cache = np.asarray(loan.logits), loan.take()
        cache_bytes = live_bytes(cache) // session.batch_size
        here = mark(cache) if go_on else None
        streams, cache = decode_tokens(
            runtime.config,
            runtime.params,
            cache,
            given,
            active,
            implementation=runtime.implementation,
        )
        if here is not None:
            loan.cache = rewind(cache, here)
    return Forced(first=first, rest=np.asarray(streams)[:, : room - 1]), cache_bytes


def score(
    runtime: Runtime, forced: Forced, tails: Sequence[Tokens], *, reference: Forced | None = None
) -> TailScores:
    """Compare the tails with what was predicted.

    Args:
      runtime: the model, whose norm and output projection are those of `reference` too.
      forced: of the model.
      tails: the true tokens.
      reference: of full caches, for the same tails.

    Raises:
      InputError: the model's numbers are not finite.
    """
    tokens, counts = pad(tails, forced.rest.shape[1] + 1)
    first = score_logits(
        jnp.asarray(forced.first),
        tokens[:, 0],
        None if reference is None else jnp.asarray(reference.first),
    )
    rest = score_streams(
        runtime.config.architecture,
        runtime.params,
        jnp.asarray(forced.rest),
        tokens[:, 1:],
        None if reference is None else jnp.asarray(reference.rest),
    )

    def whole(one: Array, many: Array) -> np.ndarray:
        return np.concatenate([np.asarray(one)[:, None], np.asarray(many)], axis=1)

    nll = whole(first.nll, rest.nll)
    kl = None if first.kl is None or rest.kl is None else whole(first.kl, rest.kl)
    check_finite(nll[np.arange(nll.shape[1]) < np.asarray(counts)[:, None]])
    return TailScores(predicted=whole(first.predicted, rest.predicted), nll=nll, kl=kl)


def pad(
    rows: Sequence[Tokens], length: int
) -> tuple[Int[Array, "batch length"], Int[Array, " batch"]]:
    """Return rows of one length, and how much of each counts."""
    padded = [np.pad(row, (0, length - row.size)) for row in rows]
    return jnp.asarray(np.stack(padded)), jnp.array([row.size for row in rows], jnp.int32)


def answer_means(values: Float[np.ndarray, " tail"], answers: Spans) -> list[float]:
    """Return the mean over the tokens of each answer."""
    return [float(np.mean(values[start:stop])) for start, stop in answers]


class References:
    """What full caches make of texts, kept until other caches have been measured on them."""

    def __init__(self) -> None:
        self._by_text: dict[object, tuple[np.ndarray, np.ndarray]] = {}

    def for_cells(self, cells: Sequence[grid.GridCell], forced: Forced) -> Forced | None:
        """Return what `forced` is to be compared with.

        That is None where it is of full caches, which are kept, and where they were not measured.

        Args:
          cells: measured with one kind of caches; the last one's row may be repeated to fill a
            batch.
          forced: of the cells.
        """
        if cells[0].caches == grid.FULL:
            for cell, first, rest in zip(cells, forced.first, forced.rest, strict=False):
                self._by_text[cell.text] = (first, rest)
            return None
        if not all(cell.text in self._by_text for cell in cells):
            return None
        rows = [self._by_text[cell.text] for cell in cells]
        rows += rows[-1:] * (len(forced.first) - len(rows))
        length = forced.rest.shape[1]
        rest = [np.pad(x[:length], ((0, max(0, length - len(x))), (0, 0))) for _, x in rows]
        return Forced(first=np.stack([first for first, _ in rows]), rest=np.stack(rest))
