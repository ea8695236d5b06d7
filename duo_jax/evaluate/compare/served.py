"""Answer a task's questions from the caches that serve a split model."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from duo_jax.evaluate.eviction import Predicted
from duo_jax.evaluate.results.forced import force
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session


def predict(
    runtime: Runtime,
    texts: Sequence[Int[np.ndarray, "_"]],
    tails: Sequence[Int[np.ndarray, "_"]],
    *,
    length: int,
    room: int,
) -> Predicted:
    """Read texts, and decode the tails, each token after the true ones before it.

    Args:
      runtime: the split model.
      texts: a row each, of at most `length` tokens.
      tails: the tokens after them, at most `room`.
      length: tokens of a text that the cache has room for.
      room: further tokens that it has room for.
    """
    session = Session(runtime, batch_size=len(texts), max_len=length + room)
    session.append([text.tolist() for text in texts])
    forced, cache_bytes = force(session, tails, room=room)
    return Predicted(forced=forced, cache_bytes=cache_bytes)
