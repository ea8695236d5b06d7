"""Passkey retrieval of a model as it is served: its text in chunks, then token by token.

A Session reads the text of a sample, in the runtime's formats of weights and caches. Questions and
answers follow one token at a time, decoded from the cache; the next token is always the true one,
whatever the model would have written. So a passkey counts as in train/retrieval_test.py: when
greedy decoding would write all of it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from duo_jax.data.passkeys import Sample
from duo_jax.evaluate.results.forced import Forced, answer_means, force, score
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Retrieved:
    """Scores of a model on some samples."""

    exact: Float[np.ndarray, "samples passkeys"]  # 1 where every token of a passkey is right
    tokens: Float[np.ndarray, "samples passkeys"]  # fraction of a passkey's tokens that are right
    nll: Float[np.ndarray, "samples passkeys"]  # mean over a passkey's tokens, nats
    kl: Float[np.ndarray, "samples passkeys"] | None  # KL(reference || model), likewise


def read(runtime: Runtime, samples: Sequence[Sample]) -> tuple[Forced, int]:
    """Read texts, then all questions and answers; return what predicts them, and a row's bytes."""
    tails = [sample.tokens[sample.tail_start :] for sample in samples]
    longest = max(tail.size for tail in tails)
    session = Session(runtime, batch_size=len(samples))
    texts = [sample.tokens[: sample.tail_start].tolist() for sample in samples]
    session.append(texts, room=longest)
    return force(session, tails, room=longest)


def judge(
    runtime: Runtime,
    samples: Sequence[Sample],
    forced: Forced,
    *,
    reference: Forced | None = None,
) -> Retrieved:
    """Score what `read` returned; the other arguments are those of `score`."""
    tails = [sample.tokens[sample.tail_start :] for sample in samples]
    answers = [
        [(a - sample.tail_start, b - sample.tail_start) for a, b in sample.answers]
        for sample in samples
    ]
    found = score(runtime, forced, tails, reference=reference)
    right = [
        (row[: tail.size] == tail).astype(float)
        for row, tail in zip(found.predicted, tails, strict=True)
    ]

    def means(values: Sequence[Float[np.ndarray, "_"]]) -> Float[np.ndarray, "samples passkeys"]:
        return np.array([answer_means(x, spans) for x, spans in zip(values, answers, strict=True)])

    tokens = means(right)
    return Retrieved(
        exact=(tokens == 1).astype(np.float64),
        tokens=tokens,
        nll=means([*found.nll]),
        kl=None if found.kl is None else means([*found.kl]),
    )
