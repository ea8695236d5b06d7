"""Scores by reconstruction: one text a step, without passkeys; see duo_jax.heads.reconstruction."""

from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.heads.reconstruction import Instruction, head_scores, key_scores
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from train.identify.batches import padded_length
from train.identify.flags import IdentifyConfig
from train.identify.scoring import check_finite, mean_scores
from train.workdir import WorkDir


def reconstruct(
    flags: IdentifyConfig,
    architecture: ModelConfig,
    params: Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the scores, and the seconds a text took (None: all was done already).

    Raises:
      InputError: a score is not finite.
    """
    instruction = Instruction.of(sampler.encode)

    def of_text(index: int) -> tuple[Float[np.ndarray, "layers kv_heads"], dict[str, Any]]:
        text = sampler.plain_text(index)
        size = text.tokens.size
        of_keys = key_scores(
            architecture,
            params,
            np.pad(text.tokens, (0, padded_length(text, flags) - size))[None],
            np.array([size], np.int32),
            instruction=instruction,
            sink_size=flags.sink,
            recent_size=flags.recent,
            implementation=flags.implementation,
        )
        check_finite(of_keys, f"text {index}")
        scores = head_scores(of_keys[:, 0])
        return scores, {"mean_score": float(scores.mean()), "length": size}

    shape = (architecture.num_layers, architecture.num_kv_heads)
    return mean_scores(flags, workdir, of_text, shape=shape, unit="text")
