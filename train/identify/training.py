"""Gates by optimisation: one sample a step, from the latest checkpoint to the last step."""

import functools
import time

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from train.identify.batches import batch_of_one, padded_length
from train.identify.config import IdentifyConfig
from train.optimisation import StepConfig, init_state, train_step
from train.workdir import WorkDir


def train(
    config: IdentifyConfig,
    model: ModelConfig,
    params: Params,
    sampler: PasskeySampler,
    workdir: WorkDir,
) -> tuple[Float[np.ndarray, "layers kv_heads"], float | None]:
    """Return the gates, and the seconds a step took (None: all was done already).

    Raises:
      InputError: the loss is not finite.
    """
    step_config = StepConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        reg_weight=config.reg_weight,
        target_sparsity=config.target_sparsity,
        sink_size=config.sink,
        recent_size=config.recent,
        mixing=config.mixing,
        tail_size=min(sampler.longest_tail(), config.data.max_length),
        objective="cross_entropy" if config.method == "lm" else "distillation",
        implementation=config.implementation,
    )
    step = jax.jit(functools.partial(train_step, model=model, config=step_config))
    make_sample = sampler.plain_text if config.method == "lm" else sampler.sample
    state = workdir.restore(init_state(model, step_config))
    first, durations = int(state.step), []
    board = summary_writer()(str(workdir.path / "tensorboard")) if config.tensorboard else None
    bar = tqdm(total=config.num_steps, initial=first, desc="identify", unit="step", disable=None)
    with bar:
        for index in range(first, config.num_steps):
            began = time.monotonic()
            sample = make_sample(index)
            length = max(padded_length(sample, config), step_config.tail_size)
            state, metrics = step(state, params, batch_of_one(sample, length))
            values = {name: float(value) for name, value in metrics.items()}
            durations.append(time.monotonic() - began)
            if not np.isfinite(values["loss"]):
                raise InputError(
                    f"the loss is not finite at step {index} ({values['loss']}); if the model is "
                    "float16 or bfloat16, try --dtype float32"
                )
            record = {"step": index + 1, **values, "length": sample.tokens.size}
            workdir.log(record)
            if board is not None:
                for name, value in values.items():
                    board.add_scalar(name, value, index + 1)
            bar.set_postfix(
                loss=f"{values['loss']:.4f}", mean_gate=f"{values['mean_gate']:.3f}", refresh=False
            )
            bar.update()
            if (index + 1) % config.checkpoint_every == 0:
                workdir.save(state)
    workdir.save(state)
    # The median leaves out the steps that compiled.
    return np.asarray(state.gates), float(np.median(durations)) if durations else None


def summary_writer():
    """Return TensorBoard's writer class.

    Raises:
      InputError: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs: pip install 'duo_jax[tensorboard]'") from None
    return SummaryWriter
