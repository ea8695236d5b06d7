"""Samples as the compiled programs take them: padded to a few lengths, each compiled once."""

import jax.numpy as jnp
import numpy as np

from duo_jax.data.passkeys import Sample
from train.distillation import Batch
from train.identify.config import IdentifyConfig


def padded_length(sample: Sample, config: IdentifyConfig) -> int:
    """Return the length of the sample's bucket."""
    width = -(-config.data.max_length // config.length_buckets)
    return -(-sample.tokens.size // width) * width


def batch_of_one(sample: Sample, length: int) -> Batch:
    """Return a sample, padded to `length`."""
    tokens = np.pad(sample.tokens, (0, length - sample.tokens.size))
    return Batch(
        tokens=jnp.asarray(tokens[None]),
        tail_start=jnp.array([sample.tail_start]),
        total_length=jnp.array([sample.tokens.size]),
    )
