"""Scores by attention profile: one sample a step."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.attention_profile import kv_scores, sample_profile
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from kernels import pytree
from train.identify.batches import padded_length
from train.identify.flags import IdentifyConfig
from train.loop import run_steps
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileState:
    """All that a checkpoint holds."""

    step: Int[Array, ""]  # samples so far
    sums: Float[Array, "layers q_heads"]  # of their profiles


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

    def one_sample(state: ProfileState) -> tuple[ProfileState, dict[str, Any]]:
        index = int(state.step)
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
        if not np.isfinite(scores).all():
            raise InputError(
                f"the attention is not finite in sample {index}; if the model is float16 or "
                "bfloat16, try --dtype float32"
            )
        mean_score = float(kv_scores(architecture, scores).mean())
        state = ProfileState(step=state.step + 1, sums=state.sums + jnp.asarray(scores))
        return state, {"mean_score": mean_score, "length": sample.tokens.size}

    total = flags.profile_samples
    start = ProfileState(
        step=jnp.zeros((), jnp.int32),
        sums=jnp.zeros((architecture.num_layers, architecture.num_q_heads), jnp.float32),
    )
    state = workdir.restore(start)
    bar = tqdm(total=total, initial=int(state.step), desc="identify", unit="sample", disable=None)
    state, seconds = run_steps(
        workdir,
        state,
        one_sample,
        bar,
        finished=lambda state: int(state.step) >= total,
        checkpoint_every=flags.checkpoint_every,
    )
    return kv_scores(architecture, np.asarray(state.sums) / total), seconds
