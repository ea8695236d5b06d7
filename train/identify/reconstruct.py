"""Scores by reconstruction: one text a step, without passkeys; see duo_jax.heads.reconstruction."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.reconstruction import Instruction, head_scores, key_scores
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from kernels import pytree
from train.identify.batches import padded_length
from train.identify.flags import IdentifyConfig
from train.loop import run_steps
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructState:
    """All that a checkpoint holds."""

    step: Int[Array, ""]  # texts so far
    sums: Float[Array, "layers kv_heads"]  # of their scores


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

    def one_text(state: ReconstructState) -> tuple[ReconstructState, dict[str, Any]]:
        index = int(state.step)
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
        if not np.isfinite(of_keys).all():
            raise InputError(
                f"the attention is not finite in text {index}; if the model is float16 or "
                "bfloat16, try --dtype float32"
            )
        scores = head_scores(of_keys[:, 0])
        state = ReconstructState(step=state.step + 1, sums=state.sums + jnp.asarray(scores))
        return state, {"mean_score": float(scores.mean()), "length": size}

    total = flags.profile_samples
    start = ReconstructState(
        step=jnp.zeros((), jnp.int32),
        sums=jnp.zeros((architecture.num_layers, architecture.num_kv_heads), jnp.float32),
    )
    state = workdir.restore(start)
    bar = tqdm(total=total, initial=int(state.step), desc="identify", unit="text", disable=None)
    state, seconds = run_steps(
        workdir,
        state,
        one_text,
        bar,
        finished=lambda state: int(state.step) >= total,
        checkpoint_every=flags.checkpoint_every,
    )
    return np.asarray(state.sums) / total, seconds
