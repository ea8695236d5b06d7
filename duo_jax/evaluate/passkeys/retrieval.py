"""Passkey retrieval of a model as it is served: its text in chunks, then token by token.

A Session reads the text of a sample, in the runtime's formats of weights and caches. Questions and
answers follow one token at a time, decoded from the cache; the next token is always the true one,
whatever the model would have written. So a passkey counts as in train/retrieval_test.py: when
greedy decoding would write all of it.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from duo_jax.cache import live_bytes
from duo_jax.data.passkeys import Sample
from duo_jax.serve.teacher_forcing import decode_tokens
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Retrieved:
    """Scores of a model on some samples."""

    exact: Float[np.ndarray, "samples passkeys"]  # 1 where every token of a passkey is right
    tokens: Float[np.ndarray, "samples passkeys"]  # fraction of a passkey's tokens that are right
    logits: Float[np.ndarray, "tokens vocab"]  # after every token of all questions and answers
    cache_bytes: int  # of one row, measured


def retrieve(runtime: Runtime, samples: Sequence[Sample], *, rows: int) -> Retrieved:
    """Ask for all passkeys of the samples, `rows` samples at a time."""
    parts = [_batch(runtime, samples[i : i + rows]) for i in range(0, len(samples), rows)]
    return Retrieved(
        exact=np.concatenate([part.exact for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        cache_bytes=parts[0].cache_bytes,
    )


def _batch(runtime: Runtime, samples: Sequence[Sample]) -> Retrieved:
    tails = [sample.tokens[sample.tail_start :] for sample in samples]
    longest = max(tail.size for tail in tails)
    session = Session(runtime, batch_size=len(samples))
    texts = [sample.tokens[: sample.tail_start].tolist() for sample in samples]
    session.append(texts, room=longest)
    padded = np.stack([np.pad(tail, (0, longest - tail.size)) for tail in tails])
    active = np.arange(longest) < np.array([[tail.size] for tail in tails])
    with session.borrowed(room=longest) as loan:
        cache = loan.take()
        num_bytes = live_bytes(cache) // len(samples)
        logits, _ = decode_tokens(
            runtime.config,
            runtime.params,
            cache,
            jnp.asarray(padded),
            jnp.asarray(active),
            implementation=runtime.implementation,
        )
    logits = np.asarray(logits, np.float32)
    right = [
        [
            row[start - 1 - sample.tail_start : stop - 1 - sample.tail_start]
            == sample.tokens[start:stop]
            for start, stop in sample.answers
        ]
        for sample, row in zip(samples, logits.argmax(axis=-1), strict=True)
    ]
    return Retrieved(
        exact=np.array([[key.all() for key in row] for row in right], np.float64),
        tokens=np.array([[key.mean() for key in row] for row in right], np.float64),
        logits=logits[active],
        cache_bytes=num_bytes,
    )
