"""Scores by attention profile: one sample a step."""

from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.heads.attention_profile import kv_scores, sample_profile
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from train.identify.batches import padded_length
from train.identify.flags import IdentifyConfig
from train.identify.scoring import check_finite, mean_scores
from train.workdir import WorkDir


def profile(
    flags: IdentifyConfig,
    architecture: ModelConfig,
    params: Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the scores, and the seconds a sample took (None: all was done already).

    Raises:
      InputError: a score is not finite.
    """

    def of_sample(index: int) -> tuple[Float[np.ndarray, "layers q_heads"], dict[str, Any]]:
        sample = sampler.sample(index)
        scores = sample_profile(
            architecture,
            params,
            sample,
            length=padded_length(sample, flags),
            sink_size=flags.sink,
            recent_size=flags.recent,
            implementation=flags.implementation,
        )
        check_finite(scores, f"sample {index}")
        mean_score = float(kv_scores(architecture, scores).mean())
        return scores, {"mean_score": mean_score, "length": sample.tokens.size}

    shape = (architecture.num_layers, architecture.num_q_heads)
    scores, seconds = mean_scores(flags, workdir, of_sample, shape=shape, unit="sample")
    return kv_scores(architecture, scores), seconds
