"""Answer a task's questions from the caches that serve a split model."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.cache import live_bytes
from duo_jax.evaluate.eviction.runner import pad
from duo_jax.serve.teacher_forcing import decode_tokens
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session


def predict(
    runtime: Runtime,
    texts: Sequence[Int[np.ndarray, "_"]],
    tails: Sequence[Int[np.ndarray, "_"]],
    *,
    length: int,
    room: int,
) -> tuple[Int[np.ndarray, "batch tail"], int]:
    """Read texts, and predict each token of the tails from the true ones before it.

    Args:
      runtime: the split model.
      texts: a row each, of at most `length` tokens.
      tails: the tokens after them, at most `room`.
      length: tokens of a text that the cache has room for.
      room: further tokens that it has room for.

    Returns:
      The most likely token at each place of the tails, and the bytes of a row's live buffers.
    """
    session = Session(runtime, batch_size=len(texts), max_len=length + room)
    session.append([text.tolist() for text in texts])
    with session.borrowed() as loan:
        cache, first = loan.take(), _most_likely(loan.logits)
    num_bytes = live_bytes(cache) // len(texts)
    given, counts = pad(tails, room)
    # The last token of a tail is predicted, not given.
    active = jnp.arange(room)[None, :] < counts[:, None] - 1
    rest, _ = decode_tokens(
        runtime.config,
        runtime.params,
        cache,
        given,
        active,
        keep=_most_likely,
        implementation=runtime.implementation,
    )
    tokens = np.concatenate([np.asarray(first)[:, None], np.asarray(rest)[:, :-1]], axis=1)
    return tokens, num_bytes


def _most_likely(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    return jnp.argmax(logits, axis=-1)
