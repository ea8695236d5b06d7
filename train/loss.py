"""What the gates minimise (DuoAttention, section 2.2, as in its code, duo_attn/train.py).

    L(alpha) = mean_t mean_c (H_full[t, c] - H_mixed[t, c])^2 + 0.05 mean |alpha|

H_full and H_mixed are outputs of the final norm: of the model with full attention, and of the model
whose attention is mixed by the gates alpha (`train.gates`); t runs over the tokens of questions and
answers, c over channels. The first term is `train.distillation`; 0.05 is `reg_weight`. As in the
paper's ablation, the next-token loss of plain text can take the place of the first term
(`train.language_modelling`).

With `target_sparsity` a controller takes the place of the second term: it steers the mean gate to
1 - target_sparsity, because on models with grouped queries the fixed weight leaves most gates at 1.
It is the method of multipliers: with the excess c = mean gate - goal,

    L(alpha) = first term + multiplier * c + 5 * c^2,    multiplier <- multiplier + 0.1 * c

The goal moves from 1 to 1 - target_sparsity over the first half of the steps and stays there, so
that the excess is small all the time and the multiplier does not run away at the start.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation
from train.answers import answer_divergence
from train.distillation import Batch, Mixing, distillation_loss
from train.language_modelling import language_modelling_loss

OfAnswers = Literal["cross_entropy", "divergence"]
Objective = OfAnswers | Literal["distillation"]
Votes = Literal["equal", "loss"]

_STIFFNESS = 10.0  # of the quadratic term: 5 = 10 / 2 above
_MULTIPLIER_RATE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything a training step is compiled for."""

    num_steps: int
    learning_rate: float
    reg_weight: float
    target_sparsity: float | None
    sink_size: int
    recent_size: int
    mixing: Mixing
    tail_size: int  # of objectives that look at questions and answers only
    objective: Objective = "distillation"
    votes: Votes = "loss"  # of texts, in `train.attribution`
    implementation: Implementation = "auto"


def objective(
    gates: Float[Array, "layers kv_heads"],
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> Float[Array, ""]:
    """Return the first term of the loss: what streaming heads cost the model."""
    options = {
        "sink_size": step.sink_size,
        "recent_size": step.recent_size,
        "mixing": step.mixing,
        "implementation": step.implementation,
    }
    if step.objective == "cross_entropy":
        return language_modelling_loss(gates, architecture, params, batch, **options)
    of_tail = answer_divergence if step.objective == "divergence" else distillation_loss
    return of_tail(gates, architecture, params, batch, tail_size=step.tail_size, **options)


def loss(
    gates: Float[Array, "layers kv_heads"],
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
    number: Int[Array, ""],
    multiplier: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return L(alpha), and its terms: the objective by its name, and the penalty.

    Args:
      gates: alpha, in [0, 1].
      params: the model's frozen parameters.
      batch: the samples.
      architecture: the model.
      step: what the step is compiled for.
      number: steps that are done.
      multiplier: of the sparsity constraint; unused without `step.target_sparsity`.
    """
    first = objective(gates, params, batch, architecture=architecture, step=step)
    if step.target_sparsity is None:
        penalty = step.reg_weight * jnp.mean(jnp.abs(gates))
    else:
        excess = _excess(gates, number, step.target_sparsity, step.num_steps)
        penalty = multiplier * excess + 0.5 * _STIFFNESS * jnp.square(excess)
    return first + penalty, {step.objective: first, "penalty": penalty}


def next_multiplier(
    multiplier: Float[Array, ""],
    gates: Float[Array, "layers kv_heads"],
    *,
    step: StepConfig,
    number: Int[Array, ""],
) -> Float[Array, ""]:
    """Return the multiplier after a step that began with these gates."""
    if step.target_sparsity is None:
        return multiplier
    excess = _excess(gates, number, step.target_sparsity, step.num_steps)
    return multiplier + _MULTIPLIER_RATE * excess


def _excess(
    gates: Float[Array, "layers kv_heads"],
    number: Int[Array, ""],
    target_sparsity: float,
    num_steps: int,
) -> Float[Array, ""]:
    """Return how far the mean gate is above its goal at this step."""
    progress = jnp.minimum(2.0 * number.astype(jnp.float32) / num_steps, 1.0)
    return jnp.mean(gates) - (1.0 - target_sparsity * progress)
