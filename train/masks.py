"""Discrete masks at a target sparsity (PruLong, arXiv 2506.17121).

    loss = cross entropy(gates = masks) + l1 (s - t) + l2 (s - t)^2

A head's mask is a random number, mostly 0 or 1 (`train.hard_concrete`), drawn anew at every step:
the model is trained as it is served, where a head streams or does not. s is the expected fraction
of masks that are 0, t its target, which rises from 0 to `step.target_sparsity` over the first 80%
of the steps. l1 and l2 ascend: whatever the cross entropy's scale is, they grow until s follows t.

log_alpha starts at N(4.5, 0.01): all heads are kept. Its Adam (0.9, 0.95) has gradients clipped to
a norm of 1, and a rate that rises over the first tenth of the steps and falls along a cosine.

PruLong moves all by 1.0 a step, with many texts in each, and ends at 1% of that. With one text a
step the heads then follow its noise, and s swings faster than the multipliers can follow. So
log_alpha's rate is a tenth of that and ends at 10%, while it can still obey; the multipliers' stays
1.0, without momentum, which would carry them on when s is where it should be. There is no weight
decay: it would pull what is undecided to log_alpha 0.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt32

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from kernels import pytree
from train import hard_concrete
from train.distillation import Batch
from train.loss import StepConfig, objective
from train.ranking import gates_of_ranking, standardised

_START, _START_SPREAD = 4.5, 0.01
_HEAD_START = 1.5  # standard deviation of log_alpha at a warm start; P(mask = 0) stays below 4%
_RAMP = 0.8  # of the steps, in which the target rises
_WARM_UP = 0.1
_LAST_RATE = 0.1  # of the peak
_LARGEST_NORM = 1.0
_MULTIPLIER_RATE = 1.0


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskState:
    """All that changes from step to step, the seed, and all that a checkpoint holds."""

    step: Int[Array, ""]  # steps that are done
    key: UInt32[Array, "2"]  # of the run; a step's random numbers follow from it and the step
    log_alpha: Float[Array, "layers kv_heads"]
    multipliers: Float[Array, "2"]  # l1 and l2
    optimisers: tuple[PyTree, PyTree]  # of log_alpha, and of the multipliers


def init_state(
    architecture: ModelConfig,
    step: StepConfig,
    *,
    seed: int,
    gates: Float[np.ndarray, "layers kv_heads"] | None = None,
) -> MaskState:
    """Return the start: all heads kept, by a warm start's `gates` the lowest of them least so."""
    shape = (architecture.num_layers, architecture.num_kv_heads)
    start = np.random.default_rng(seed).normal(_START, _START_SPREAD, shape)
    if gates is not None:
        start += _HEAD_START * standardised(gates)
    log_alpha, multipliers = jnp.asarray(start, jnp.float32), jnp.zeros(2, jnp.float32)
    return MaskState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        log_alpha=log_alpha,
        multipliers=multipliers,
        optimisers=(_optimiser(step).init(log_alpha), _ascent().init(multipliers)),
    )


def train_step(
    state: MaskState,
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> tuple[MaskState, dict[str, Float[Array, ""]]]:
    """Update masks and multipliers on one batch; `step.target_sparsity` must be a number.

    Returns:
      The new state, and metrics: loss, the objective by its name, target (of this step's s) and
      both multipliers; mean_gate (1 - s), gates_above_half and gates_undecided (fractions of heads
      that are kept with a probability above 0.5; from 0.1 to 0.9) after the step.
    """
    loss_of = functools.partial(
        loss, state=state, params=params, batch=batch, architecture=architecture, step=step
    )
    (value, terms), (downhill, uphill) = jax.value_and_grad(loss_of, has_aux=True)(
        (state.log_alpha, state.multipliers)
    )
    # optax mixes its integer step count with floats; our own code promotes nothing silently.
    with jax.numpy_dtype_promotion("standard"):
        descent, descent_state = _optimiser(step).update(downhill, state.optimisers[0])
        ascent, ascent_state = _ascent().update(-uphill, state.optimisers[1])
    log_alpha = state.log_alpha + jnp.asarray(descent)
    multipliers = state.multipliers + jnp.asarray(ascent)
    kept = 1 - hard_concrete.probability_of_zero(log_alpha)
    metrics = {
        "loss": value,
        **terms,
        "l1": multipliers[0],
        "l2": multipliers[1],
        "mean_gate": jnp.mean(kept),
        "gates_above_half": jnp.mean((kept > 0.5).astype(jnp.float32)),
        "gates_undecided": jnp.mean((jnp.abs(kept - 0.5) < 0.4).astype(jnp.float32)),
    }
    new = MaskState(
        step=state.step + 1,
        key=state.key,
        log_alpha=log_alpha,
        multipliers=multipliers,
        optimisers=(descent_state, ascent_state),
    )
    return new, metrics


def loss(
    variables: tuple[Float[Array, "layers kv_heads"], Float[Array, "2"]],
    state: MaskState,
    params: llama.Params,
    batch: Batch,
    *,
    architecture: ModelConfig,
    step: StepConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the loss of log_alpha and multipliers, and the objective and the target.

    The masks are those of the state's key and step.
    """
    log_alpha, (l1, l2) = variables
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    gates = hard_concrete.sample(key, log_alpha)
    first = objective(gates, params, batch, architecture=architecture, step=step)
    goal = target(step, state.step).astype(log_alpha.dtype)
    excess = jnp.mean(hard_concrete.probability_of_zero(log_alpha)) - goal
    penalty = l1 * excess + l2 * jnp.square(excess)
    return first + penalty, {step.objective: first, "target": goal}


def target(step: StepConfig, number: Int[Array, ""]) -> Float[Array, ""]:
    """Return the target of the expected sparsity at a step, after `number` others."""
    assert step.target_sparsity is not None
    progress = number.astype(jnp.float32) / (_RAMP * step.num_steps)
    return step.target_sparsity * jnp.minimum(progress, 1.0)


def pattern_gates(
    log_alpha: Float[Array, "layers kv_heads"], step: StepConfig
) -> Float[np.ndarray, "layers kv_heads"]:
    """Return gates for a pattern file: above 0.5 are as many as the target keeps, by log_alpha.

    A line on stderr says so where the masks ended further from the target than one head.
    """
    assert step.target_sparsity is not None
    zeros = float(jnp.sum(hard_concrete.probability_of_zero(log_alpha)))
    wanted = log_alpha.size * step.target_sparsity
    if abs(zeros - wanted) > 1:
        print(
            f"warning: the masks ended with {zeros:.1f} streaming heads, where the target is "
            f"{wanted:.1f}: they were still moving, and more --num-steps may choose better heads",
            file=sys.stderr,
        )
    return gates_of_ranking(np.asarray(log_alpha), kept=log_alpha.size - round(wanted))


def _optimiser(step: StepConfig) -> optax.GradientTransformation:
    peak, warm_up = step.learning_rate, max(round(_WARM_UP * step.num_steps), 1)
    rate = optax.warmup_cosine_decay_schedule(
        init_value=peak / warm_up,
        peak_value=peak,
        warmup_steps=warm_up,
        decay_steps=max(step.num_steps, warm_up + 1),
        end_value=_LAST_RATE * peak,
    )
    adam = optax.adam(rate, b1=0.9, b2=0.95)
    return optax.chain(optax.clip_by_global_norm(_LARGEST_NORM), adam)


def _ascent() -> optax.GradientTransformation:
    """Return the optimiser of the multipliers: it descends, on minus their gradient."""
    return optax.adam(_MULTIPLIER_RATE, b1=0.0, b2=0.95)
