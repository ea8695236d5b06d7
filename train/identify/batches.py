"""Samples padded to one of a few lengths, so that few programs are compiled."""

import jax.numpy as jnp
import numpy as np

from duo_jax.data.passkeys import Sample
from train.distillation import Batch
from train.identify.flags import IdentifyConfig


def padded_length(sample: Sample, flags: IdentifyConfig) -> int:
    """Return the length of the sample's bucket."""
    width = -(-flags.data.max_length // flags.length_buckets)
    return -(-sample.tokens.size // width) * width


def batch_of_one(sample: Sample, length: int) -> Batch:
    """Return a sample, padded to `length`; of a text without answers every prediction counts."""
    tokens = np.pad(sample.tokens, (0, length - sample.tokens.size))
    answers = np.zeros(length, bool)
    for start, stop in sample.answers or ((1, sample.tokens.size),):
        answers[start:stop] = True
    return Batch(
        tokens=jnp.asarray(tokens[None]),
        tail_start=jnp.array([sample.tail_start]),
        total_length=jnp.array([sample.tokens.size]),
        answers=jnp.asarray(answers[None]),
    )
