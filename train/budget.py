"""Gates whose mean is given: mirror descent under a budget.

    gate[h] = sigmoid(score[h] + shift), with the shift that makes the mean gate the step's budget
    score[h] <- score[h] - rate * d objective / d gate[h] / scale

scale is a running mean, over steps, of the gradient's root mean square over heads. The budget falls
from 1 to 1 - target_sparsity over the first 60% of the steps and stays there.

This is mirror descent (Nemirovski and Yudin 1983) on the gates with that mean, for the entropy of a
coin with probability gate[h]. Its purpose beside `train.optimisation`, the paper's way:

- The mean is exact at every step. A penalty competes with the objective instead, and both its
  weight and a controller's rates fit one scale of the objective: distillation gives 1e-7 while the
  gates are near 1, and 1e-1 when they are not.
- A score is the sum of what the head was worth on the way, so that gates run apart towards 0 and
  1, and the gradient is soon taken where the model will be served. Gates that minimise a smooth
  loss stay between, where every head still passes on a part of everything it sees.
- One scale for all heads keeps their gradients comparable. Adam divides each by its own size: a
  head that hardly matters then moves as fast as one that all answers depend on.
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
from train.ranking import standardised

_FALL = 0.6  # of the steps, in which the budget falls
_MEMORY = 0.8  # of the scale
_HEAD_START = 10  # steps that a warm start is worth
_WIDEST = 20.0  # shift beyond the scores: no gate is further from 0 or 1 than float32 can tell
_ROUNDING = 1e-6  # nats per gate; smaller gradients may be rounding errors, and are not scaled up
_HALVINGS = 40  # of the interval in which the shift lies


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetState:
    """All that changes from step to step, and all that a checkpoint holds."""

    step: Int[Array, ""]  # steps that are done
    scores: Float[Array, "layers kv_heads"]
    scale: Float[Array, ""]  # the running mean, before its correction for a start at 0


def init_state(
    architecture: ModelConfig,
    step: StepConfig,
    *,
    gates: Float[np.ndarray, "layers kv_heads"] | None = None,
) -> BudgetState:
    """Return the start: every head worth the same, or as if steps had agreed on a warm start."""
    shape = (architecture.num_layers, architecture.num_kv_heads)
    scores = np.zeros(shape) if gates is None else standardised(gates)
    return BudgetState(
        step=jnp.zeros((), jnp.int32),
        scores=jnp.asarray(_HEAD_START * step.learning_rate * scores, jnp.float32),
        scale=jnp.zeros((), jnp.float32),
    )


def train_step(
    state: BudgetState,
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> tuple[BudgetState, dict[str, Float[Array, ""]]]:
    """Update the scores on one batch; `step.target_sparsity` must be a number.

    Returns:
      The new state, and metrics: the objective by its name and as loss; mean_gate, gates_above_half
      and gates_undecided (fractions: above 0.5; from 0.1 to 0.9) after the step.
    """
    gates = gates_of(state.scores, budget(step, state.step))
    value, gradient = jax.value_and_grad(objective)(
        gates, params, batch, architecture=architecture, step=step
    )
    size = jnp.sqrt(jnp.mean(jnp.square(gradient)))
    scale = _MEMORY * state.scale + (1 - _MEMORY) * size
    number = state.step + 1
    mean_size = scale / (1 - _MEMORY ** number.astype(jnp.float32))
    scores = state.scores - step.learning_rate * gradient / jnp.maximum(mean_size, _ROUNDING)
    gates = gates_of(scores, budget(step, state.step))
    metrics = {
        "loss": value,
        step.objective: value,
        "mean_gate": jnp.mean(gates),
        "gates_above_half": jnp.mean((gates > 0.5).astype(jnp.float32)),
        "gates_undecided": jnp.mean((jnp.abs(gates - 0.5) < 0.4).astype(jnp.float32)),
    }
    return BudgetState(step=number, scores=scores, scale=scale), metrics


def budget(step: StepConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Return the mean gate of a step, after `number` others."""
    assert step.target_sparsity is not None
    progress = (number.astype(jnp.float32) + 1) / (_FALL * step.num_steps)
    return 1.0 - step.target_sparsity * jnp.minimum(progress, 1.0)


def pattern_gates(
    scores: Float[Array, "layers kv_heads"], step: StepConfig
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return gates for a pattern file: the heads above 0.5 are those of the last step.

    The gates themselves are nearly all 0 or 1, and some equal in float32, while other sparsities
    than the target need the whole ranking. So these are sigmoids of scores that vary by 1.
    """
    logits = _logits(scores, budget(step, jnp.int32(step.num_steps)))
    spread = jnp.maximum(jnp.std(logits), jnp.finfo(jnp.float32).tiny)
    return np.asarray(jax.nn.sigmoid(logits / spread))


def gates_of(
    scores: Float[Array, "layers kv_heads"], mean: Float[Array, ""]
) -> Float[Array, "layers kv_heads"]:
    """Return sigmoid(scores + shift) with the given mean."""
    return jax.nn.sigmoid(_logits(scores, mean))


def _logits(
    scores: Float[Array, "layers kv_heads"], mean: Float[Array, ""]
) -> Float[Array, "layers kv_heads"]:
    """Return scores + shift, by bisection."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = jnp.mean(jax.nn.sigmoid(scores + middle)) > mean
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    ends = (-jnp.max(scores) - _WIDEST, -jnp.min(scores) + _WIDEST)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    return scores + (low + high) / 2
