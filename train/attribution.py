"""Heads ranked by what they are worth to the answers: integrated gradients along the gates.

    credit[h] = integral from 1 - sparsity to 1 of -d NLL(answers) / d gate[h] at gates = a, over a

(Sundararajan et al. 2017, arXiv 1703.01365.) All gates are the same number a, and both terms of the
mixed attention come from the model's own queries, keys and values (mixing "self"). The credits of
all heads sum up to what the answers' likelihood loses from full attention to gates of 1 - sparsity.

Most of that is lost at the end of the path: on SmolLM2 the second half of it has three to six times
the gradients of the first, so that a third of the texts decide, and those with a model that has
lost more than the served one. With votes "equal" each text's gradients are divided by the sum of
their magnitudes.

The path ends at 1 - `target_sparsity`, the mean gate of what will be served.
Below that mean the model has lost what the served one keeps, and a head's gradient there says
little about its worth where most others work: measured on SmolLM2, credits of the whole path choose
worse heads for 50% streaming than for 75% and more (issue 16).

Step i of n takes text i and the middle of the i-th of n equal parts of the path, from 1 downwards.
A pass costs the same with another text as with the same one, and more texts tell more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import pytree
from train.distillation import Batch
from train.loss import StepConfig, objective
from train.ranking import gates_of_ranking

_ROUNDING = 1e-3  # nats; where all gates together change less, it is rounding, and has no full vote


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributionState:
    """All that a checkpoint holds."""

    step: Int[Array, ""]  # passes that are done
    credit: Float[Array, "layers kv_heads"]  # of these; with equal votes no nats, but shares


def init_state(architecture: ModelConfig) -> AttributionState:
    """Return the start: no credit yet."""
    shape = (architecture.num_layers, architecture.num_kv_heads)
    return AttributionState(step=jnp.zeros((), jnp.int32), credit=jnp.zeros(shape, jnp.float32))


def train_step(
    state: AttributionState,
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> tuple[AttributionState, dict[str, Float[Array, ""]]]:
    """Add one batch's part of the path.

    Returns:
      The new state, and metrics: the objective by its name and as loss, and mean_gate: the place on
      the path.
    """
    at, length = part_of_path(step, state.step)
    gates = jnp.full(state.credit.shape, at)
    value, gradient = jax.value_and_grad(objective)(
        gates, params, batch, architecture=architecture, step=step
    )
    if step.votes == "equal":
        gradient /= jnp.maximum(jnp.sum(jnp.abs(gradient)), _ROUNDING)
    new = AttributionState(step=state.step + 1, credit=state.credit - length * gradient)
    return new, {"loss": value, step.objective: value, "mean_gate": at}


def part_of_path(step: StepConfig, number: Int[Array, ""]) -> tuple[Float[Array, ""], float]:
    """Return the middle of a step's part of the path, after `number` others, and its length."""
    assert step.target_sparsity is not None
    length = step.target_sparsity / step.num_steps
    return 1.0 - length * (number.astype(jnp.float32) + 0.5), length


def pattern_gates(
    credit: Float[Array, "layers kv_heads"], step: StepConfig
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return gates for a pattern file, in the order of the credits.

    Those above 0.5 are the heads that the target keeps.
    """
    assert step.target_sparsity is not None
    kept = round(credit.size * (1 - step.target_sparsity))
    return gates_of_ranking(np.asarray(credit), kept=kept)
