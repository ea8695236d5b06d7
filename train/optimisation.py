"""One step of gate training, with the published optimiser and schedule.

AdamW (betas 0.9 and 0.999, eps 1e-8, no weight decay, no clipping) on the loss of `train.loss`.
Gates are in float32, start at 1, and are clipped to [0, 1] after every step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import pytree
from train.distillation import Batch
from train.loss import StepConfig, loss, next_multiplier


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class GateState:
    """All that changes from step to step, and all that a checkpoint holds."""

    step: Int[Array, ""]  # steps that are done
    gates: Float[Array, "layers kv_heads"]
    optimiser: PyTree
    multiplier: Float[Array, ""]  # of the sparsity constraint; idle without target_sparsity


def learning_rate(step: StepConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Rise over the first fifth of the steps, hold, fall over the last fifth; 0.1 at both ends."""
    ramp = max(step.num_steps // 5, 1)
    number = number.astype(jnp.float32)
    rise, fall = (number + 1) / ramp, (step.num_steps - number) / ramp
    return step.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.1, 1.0)


def init_state(architecture: ModelConfig, step: StepConfig) -> GateState:
    """Return the start: every head a retrieval head."""
    gates = jnp.ones((architecture.num_layers, architecture.num_kv_heads), jnp.float32)
    return GateState(
        step=jnp.zeros((), jnp.int32),
        gates=gates,
        optimiser=_optimiser(step).init(gates),
        multiplier=jnp.zeros((), jnp.float32),
    )


def train_step(
    state: GateState,
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> tuple[GateState, dict[str, Float[Array, ""]]]:
    """Update the gates on one batch.

    Returns:
      The new state, and metrics: loss, the objective by its name, penalty, mean_gate and
      gates_above_half (a fraction; both after the step), learning_rate.
    """
    loss_of = functools.partial(
        loss,
        params=params,
        batch=batch,
        architecture=architecture,
        step=step,
        number=state.step,
        multiplier=state.multiplier,
    )
    (value, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.gates)
    # optax mixes its integer step count with floats; our own code promotes nothing silently.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimiser = _optimiser(step).update(gradient, state.optimiser, state.gates)
    gates = jnp.clip(state.gates + jnp.asarray(updates), 0.0, 1.0)
    metrics = {
        "loss": value,
        **terms,
        "mean_gate": jnp.mean(gates),
        "gates_above_half": jnp.mean((gates > 0.5).astype(jnp.float32)),
        "learning_rate": learning_rate(step, state.step),
    }
    new = GateState(
        step=state.step + 1,
        gates=gates,
        optimiser=optimiser,
        multiplier=next_multiplier(state.multiplier, state.gates, step=step, number=state.step),
    )
    return new, metrics


def _optimiser(step: StepConfig) -> optax.GradientTransformation:
    return optax.adamw(
        lambda count: learning_rate(step, jnp.asarray(count)),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
    )
