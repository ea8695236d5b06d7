"""Gates by training: one sample a step."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from train import budget, optimisation
from train.identify.batches import batch_of_one, padded_length
from train.identify.flags import IdentifyConfig, Method
from train.loop import run_steps
from train.loss import Objective, StepConfig
from train.workdir import WorkDir

_OBJECTIVES: dict[Method, Objective] = {
    "optimise": "distillation",
    "budget": "divergence",
    "lm": "cross_entropy",
}

State = budget.BudgetState | optimisation.GateState


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
    if flags.method == "budget":
        start, one_update = budget.init_state(architecture), budget.train_step
    else:
        start, one_update = optimisation.init_state(architecture, step), optimisation.train_step
    update = jax.jit(functools.partial(one_update, architecture=architecture, step=step))
    make_sample = sampler.plain_text if flags.method == "lm" else sampler.sample
    board = summary_writer()(str(workdir.path / "tensorboard")) if flags.tensorboard else None

    def one_step(state: State) -> tuple[State, dict[str, Any]]:
        index = int(state.step)
        sample = make_sample(index)
        length = max(padded_length(sample, flags), step.tail_size)
        state, metrics = update(state, params, batch_of_one(sample, length))
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(values["loss"]):
            raise InputError(
                f"the loss is not finite at step {index} ({values['loss']}); if the model is "
                "float16 or bfloat16, try --dtype float32"
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
    if isinstance(state, budget.BudgetState):
        return budget.pattern_gates(state.scores, step), seconds
    return np.asarray(state.gates), seconds


def step_config(flags: IdentifyConfig, *, tail_size: int) -> StepConfig:
    """Return what a training step is compiled for.

    Args:
      flags: the command's.
      tail_size: positions that are compared.
    """
    flags = flags.resolved()
    assert flags.num_steps
    assert flags.learning_rate
    assert flags.mixing
    return StepConfig(
        num_steps=flags.num_steps,
        learning_rate=flags.learning_rate,
        reg_weight=flags.reg_weight,
        target_sparsity=flags.target_sparsity,
        sink_size=flags.sink,
        recent_size=flags.recent,
        mixing=flags.mixing,
        tail_size=tail_size,
        objective=_OBJECTIVES[flags.method],
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
