"""Scores of heads without training: the mean over samples, one sample a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from duo_jax.errors import InputError
from kernels import pytree
from train.identify.flags import IdentifyConfig
from train.loop import run_steps
from train.workdir import WorkDir


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreState:
    """All that a checkpoint holds."""

    step: Int[Array, ""]  # samples so far
    sums: Float[Array, "layers heads"]  # of their scores


def check_finite(attention: Float[np.ndarray, "..."], sample: str) -> None:
    """Refuse attention that is not finite in a sample, which the message names.

    Raises:
      InputError: some is not.
    """
    if not np.isfinite(attention).all():
        raise InputError(
            f"the attention is not finite in {sample}; if the model is float16 or bfloat16, try "
            "--dtype float32"
        )


def mean_scores(
    flags: IdentifyConfig,
    workdir: WorkDir,
    score: Callable[[int], tuple[Float[np.ndarray, "layers heads"], dict[str, Any]]],
    *,
    shape: tuple[int, int],
    unit: str,
) -> tuple[Float[np.ndarray, "layers heads"], float | None]:
    """Return the mean over `flags.profile_samples`, and the seconds a sample took.

    Args:
      flags: of the command.
      workdir: where the run is kept.
      score: returns the scores of a sample, given its number, and the metrics of the step.
      shape: of the scores.
      unit: what a sample is called.

    Returns:
      The scores; and None for the seconds where all was done already.
    """

    def one_sample(state: ScoreState) -> tuple[ScoreState, dict[str, Any]]:
        scores, metrics = score(int(state.step))
        return ScoreState(step=state.step + 1, sums=state.sums + jnp.asarray(scores)), metrics

    total = flags.profile_samples
    start = ScoreState(step=jnp.zeros((), jnp.int32), sums=jnp.zeros(shape, jnp.float32))
    state = workdir.restore(start)
    bar = tqdm(total=total, initial=int(state.step), desc="identify", unit=unit, disable=None)
    state, seconds = run_steps(
        workdir,
        state,
        one_sample,
        bar,
        finished=lambda state: int(state.step) >= total,
        checkpoint_every=flags.checkpoint_every,
    )
    return np.asarray(state.sums) / total, seconds
