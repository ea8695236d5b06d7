"""Passkey samples of a small size, for tests."""

import dataclasses

import numpy as np

from duo_jax.data.passkeys import PasskeyConfig

SMALL = PasskeyConfig(num_passkeys=3, passkey_words=4, min_length=60, max_length=400, num_lengths=5)
INDICES = range(40)

# Nothing but passkeys, so that their lengths in tokens matter most.
BARE = dataclasses.replace(
    SMALL, min_length=1, intro="", needle="{passkey}\n", closing="", question="", separator="\n"
)


def same(a, b) -> bool:
    return (
        np.array_equal(a.tokens, b.tokens)
        and (a.tail_start, a.answers, a.depths) == (b.tail_start, b.answers, b.depths)
    )  # fmt: skip


def answers_of(sample, tokenizer) -> list[str]:
    return [tokenizer.decode(sample.tokens[start:stop]) for start, stop in sample.answers]
