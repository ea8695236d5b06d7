"""Scores by attention profile, sample after sample, resumed like training."""

import dataclasses
import time

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
from train.identify.config import IdentifyConfig
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileState:
    """All that a checkpoint holds."""

    step: Int[Array, ""]  # samples so far
    sums: Float[Array, "layers q_heads"]  # of their profiles


def profile(
    config: IdentifyConfig,
    model: ModelConfig,
    params: Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the scores, and the seconds a sample took (None: all was done already).

    Raises:
      InputError: a score is not finite.
    """
    state = workdir.restore(
        ProfileState(
            step=jnp.zeros((), jnp.int32),
            sums=jnp.zeros((model.num_layers, model.num_q_heads), jnp.float32),
        )
    )
    first, total, durations = int(state.step), config.profile_samples, []
    bar = tqdm(total=total, initial=first, desc="identify", unit="sample", disable=None)
    with bar:
        for index in range(first, total):
            began = time.monotonic()
            sample = sampler.sample(index)
            scores = sample_profile(
                model,
                params,
                sample,
                length=padded_length(sample, config),
                sink_size=config.sink,
                recent_size=config.recent,
                implementation=config.implementation,
            )
            durations.append(time.monotonic() - began)
            if not np.isfinite(scores).all():
                raise InputError(
                    f"the attention is not finite in sample {index}; if the model is float16 or "
                    "bfloat16, try --dtype float32"
                )
            state = ProfileState(step=state.step + 1, sums=state.sums + jnp.asarray(scores))
            mean_score = float(kv_scores(model, scores).mean())
            record = {"step": index + 1, "mean_score": mean_score, "length": sample.tokens.size}
            workdir.log(record)
            bar.update()
            if (index + 1) % config.checkpoint_every == 0:
                workdir.save(state)
    workdir.save(state)
    scores = kv_scores(model, np.asarray(state.sums) / total)
    # The median leaves out the samples that compiled.
    return scores, float(np.median(durations)) if durations else None
