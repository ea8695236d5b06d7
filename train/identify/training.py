"""Gates by training: one sample a step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from duo_jax.data.passkeys import PasskeySampler, Sample
from duo_jax.errors import InputError
from duo_jax.heads.pattern import check_fits, load_pattern
from duo_jax.mesh.devices import mesh_under, on_all, on_one
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from train import attribution, budget, masks, optimisation
from train.identify.batches import batch_of_one, padded_length
from train.identify.flags import IdentifyConfig, Method
from train.loop import run_steps
from train.loss import Objective, StepConfig
from train.workdir import WorkDir

_OBJECTIVES: dict[Method, Objective] = {
    "optimise": "distillation",
    "budget": "divergence",
    "masks": "cross_entropy",
    "lm": "cross_entropy",
}

State = attribution.AttributionState | budget.BudgetState | masks.MaskState | optimisation.GateState


def train(
    flags: IdentifyConfig,
    architecture: ModelConfig,
    params: Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the gates, and the seconds a step took (None: all was done already).

    Raises:
      InputError: the loss is not finite.
    """
    step = step_config(flags, tail_size=min(sampler.longest_tail(), flags.data.max_length))
    start, one_update = _method(flags, architecture, step)
    update = jax.jit(functools.partial(one_update, architecture=architecture, step=step))
    mesh = mesh_under(params)
    tail = step.tail_size if step.objective == "divergence" else None
    board = summary_writer()(str(workdir.path / "tensorboard")) if flags.tensorboard else None

    def one_step(state: State) -> tuple[State, dict[str, Any]]:
        index = int(state.step)
        sample = sample_of_step(flags, sampler, index, tail=tail)
        length = max(padded_length(sample, flags), step.tail_size)
        state, metrics = update(on_all(state, mesh), params, batch_of_one(sample, length))
        state = on_one(state, mesh)  # a checkpoint does not depend on the number of devices
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(values["loss"]) or not _is_finite(state):
            raise InputError(
                f"the loss or its gradient is not finite at step {index} (loss {values['loss']}); "
                "if the model is float16 or bfloat16, try --dtype float32"
            )
        if board is not None:
            for name, value in values.items():
                board.add_scalar(name, value, index + 1)
        return state, values | {"length": sample.tokens.size}

    state = workdir.restore(start)
    bar = tqdm(
        total=step.num_steps, initial=int(state.step), desc="identify", unit="step", disable=None
    )
    state, seconds = run_steps(
        workdir,
        state,
        one_step,
        bar,
        finished=lambda state: int(state.step) >= step.num_steps,
        checkpoint_every=flags.checkpoint_every,
        shown=("loss", "mean_gate"),
    )
    return _gates(on_one(state, mesh), step), seconds


def _is_finite(state: State) -> bool:
    """Whether no number of a state is infinite or undefined."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return all(np.isfinite(leaf).all() for leaf in jax.device_get(leaves))


def turns(flags: IdentifyConfig) -> tuple[str, ...]:
    """Return the names of what the samples of successive steps are, from the first step on."""
    return ("plain text", "passkeys") if flags.learn_from == "both" else ()


def sample_of_step(
    flags: IdentifyConfig, sampler: PasskeySampler, index: int, *, tail: int | None = None
) -> Sample:
    """Return the sample of step `index`.

    Args:
      flags: the command's.
      sampler: makes the samples.
      index: number of the step.
      tail: last tokens of plain text that are predicted; None: all.
    """
    if turns(flags):  # Of passkeys, too, every second sample may be a chat.
        plain, index = index % 2 == 0, index // 2
    else:
        plain = flags.method == "lm" or flags.learn_from == "text"
    return sampler.plain_text(index, tail=tail) if plain else sampler.sample(index)


def warm_start(
    flags: IdentifyConfig, architecture: ModelConfig
) -> Float[np.ndarray, "layers kv_heads"] | None:
    """Return the gates of --init.

    Raises:
      InputError: they cannot be read, or are another model's.
    """
    if flags.init is None:
        return None
    pattern = load_pattern(flags.init)
    layers, kv_heads = architecture.num_layers, architecture.num_kv_heads
    check_fits(pattern, num_layers=layers, num_kv_heads=kv_heads)
    return pattern.gates


def _method(
    flags: IdentifyConfig, architecture: ModelConfig, step: StepConfig
) -> tuple[State, Callable[..., Any]]:
    """Return the state that the method begins with, and its step."""
    gates = warm_start(flags, architecture)
    match flags.method:
        case "attribute":
            return attribution.init_state(architecture), attribution.train_step
        case "budget":
            return budget.init_state(architecture, step, gates=gates), budget.train_step
        case "masks":
            start = masks.init_state(architecture, step, seed=flags.seed, gates=gates)
            return start, masks.train_step
    return optimisation.init_state(architecture, step), optimisation.train_step


def _gates(state: State, step: StepConfig) -> Float[np.ndarray, "layers kv_heads"]:
    """Return the gates that the last state says."""
    match state:
        case attribution.AttributionState():
            return attribution.pattern_gates(state.credit, step)
        case budget.BudgetState():
            return budget.pattern_gates(state.scores, step)
        case masks.MaskState():
            return masks.pattern_gates(state.log_alpha, step)
    return np.asarray(state.gates)


def step_config(flags: IdentifyConfig, *, tail_size: int) -> StepConfig:
    """Return what a training step is compiled for.

    Args:
      flags: the command's.
      tail_size: positions that are compared.
    """
    flags = flags.resolved()
    assert flags.num_steps
    assert flags.mixing
    return StepConfig(
        num_steps=flags.num_steps,
        learning_rate=flags.learning_rate or 0.0,  # attribution has none
        reg_weight=flags.reg_weight,
        target_sparsity=flags.target_sparsity,
        sink_size=flags.sink,
        recent_size=flags.recent,
        mixing=flags.mixing,
        tail_size=tail_size,
        objective=flags.objective or _OBJECTIVES[flags.method],
        votes=flags.votes or "loss",
        implementation=flags.implementation,
    )


def summary_writer() -> Any:
    """Return TensorBoard's writer class.

    Raises:
      InputError: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--tensorboard needs: pip install 'duo_jax[tensorboard]'") from None
    return SummaryWriter
