"""One step of gate training: the published optimiser, schedule and penalty.

    loss = distillation + reg_weight * mean |gate|

(or the language-modelling loss in place of distillation, as in the paper's ablation). AdamW (betas
0.9 and 0.999, eps 1e-8, no weight decay, no clipping), gates in float32, kept in [0, 1], starting
at 1. With `target_sparsity` the fixed weight becomes a controller that steers the
mean gate to 1 - target_sparsity, because on models with grouped queries the fixed weight leaves
most gates at 1. It is the method of multipliers: with the excess c = mean gate - goal,

    loss = distillation + multiplier * c + 5 * c^2,    multiplier <- multiplier + 0.1 * c

The goal moves from 1 to 1 - target_sparsity over the first half of the steps and stays there, so
that the excess is small all the time and the multiplier does not run away at the start.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import Implementation, pytree
from train.distillation import Batch, Mixing, distillation_loss
from train.language_modelling import language_modelling_loss

Objective = Literal["distillation", "cross_entropy"]

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
    tail_size: int  # of distillation
    objective: Objective = "distillation"
    implementation: Implementation = "auto"


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class GateState:
    """All that changes from step to step, and all that a checkpoint holds."""

    step: Int[Array, ""]
    gates: Float[Array, "layers kv_heads"]
    optimiser: PyTree
    multiplier: Float[Array, ""]  # of the sparsity constraint; idle without target_sparsity


def learning_rate(config: StepConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """Rise over the first fifth of the steps, hold, fall over the last fifth; 0.1 at both ends."""
    ramp = max(config.num_steps // 5, 1)
    step = step.astype(jnp.float32)
    rise, fall = (step + 1) / ramp, (config.num_steps - step) / ramp
    return config.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.1, 1.0)


def init_state(model: ModelConfig, config: StepConfig) -> GateState:
    """Return the start: every head a retrieval head."""
    gates = jnp.ones((model.num_layers, model.num_kv_heads), jnp.float32)
    return GateState(
        step=jnp.zeros((), jnp.int32),
        gates=gates,
        optimiser=_optimiser(config).init(gates),
        multiplier=jnp.zeros((), jnp.float32),
    )


def train_step(
    state: GateState, params: llama.Params, batch: Batch, *, model: ModelConfig, config: StepConfig
) -> tuple[GateState, dict[str, Float[Array, ""]]]:
    """Update the gates on one batch.

    Returns:
      The new state, and metrics: loss, the objective by its name, penalty, mean_gate and
      gates_above_half (a fraction; both after the step), learning_rate.
    """

    def loss_of(gates):
        objective = _objective(gates, params, batch, model, config)
        penalty = _penalty(gates, state, config)
        return objective + penalty, (objective, penalty)

    (loss, (objective, penalty)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.gates)
    # optax mixes its integer step count with floats; our own code promotes nothing silently.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimiser = _optimiser(config).update(gradient, state.optimiser, state.gates)
    gates = jnp.clip(optax.apply_updates(state.gates, updates), 0.0, 1.0)
    multiplier = state.multiplier
    if config.target_sparsity is not None:
        multiplier = multiplier + _MULTIPLIER_RATE * _excess(state.gates, state.step, config)
    metrics = {
        "loss": loss,
        config.objective: objective,
        "penalty": penalty,
        "mean_gate": jnp.mean(gates),
        "gates_above_half": jnp.mean((gates > 0.5).astype(jnp.float32)),
        "learning_rate": learning_rate(config, state.step),
    }
    new = GateState(step=state.step + 1, gates=gates, optimiser=optimiser, multiplier=multiplier)
    return new, metrics


def _optimiser(config: StepConfig) -> optax.GradientTransformation:
    return optax.adamw(
        lambda step: learning_rate(config, step), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0
    )


def _objective(gates, params, batch: Batch, model: ModelConfig, config: StepConfig):
    options = {
        "sink_size": config.sink_size,
        "recent_size": config.recent_size,
        "mixing": config.mixing,
        "implementation": config.implementation,
    }
    if config.objective == "cross_entropy":
        return language_modelling_loss(gates, model, params, batch, **options)
    return distillation_loss(gates, model, params, batch, tail_size=config.tail_size, **options)


def _penalty(gates, state: GateState, config: StepConfig) -> Float[Array, ""]:
    if config.target_sparsity is None:
        return config.reg_weight * jnp.mean(jnp.abs(gates))
    excess = _excess(gates, state.step, config)
    return state.multiplier * excess + 0.5 * _STIFFNESS * jnp.square(excess)


def _excess(gates, step: Int[Array, ""], config: StepConfig) -> Float[Array, ""]:
    """Return how far the mean gate is above its goal at this step."""
    progress = jnp.minimum(2.0 * step.astype(jnp.float32) / config.num_steps, 1.0)
    return jnp.mean(gates) - (1.0 - config.target_sparsity * progress)
