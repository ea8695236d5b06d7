"""Identification from start to end: load, train (or resume), save the pattern, report."""

import contextlib
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from duo_jax import pretrained
from duo_jax.config import ModelConfig
from duo_jax.errors import InputError
from duo_jax.passkeys import PasskeySampler, Sample
from duo_jax.pattern import Pattern, save_pattern
from duo_jax.text import load_documents, split_held_out
from train import plots, report
from train import workdir as work
from train.distillation import Batch
from train.evaluate import RetrievalTest
from train.identify.config import IdentifyConfig
from train.optimisation import GateState, StepConfig, init_state, train_step

# Fields that may differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "checkpoint_every", "tensorboard")


def identify(config: IdentifyConfig) -> None:
    """Learn the gates of a model and write everything a person wants to see of them.

    Writes to the work folder: config.json, metrics.jsonl, checkpoints/, pattern/ (gates in the
    published file format), gates.png, history.png, report.json and report.md; prints the report.
    A second call resumes, or repeats the printed report if all is done.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    started = time.monotonic()
    if config.tensorboard:
        _summary_writer()
    folder = pretrained.resolve(config.model)
    model = pretrained.load_config(folder)
    if config.data.max_length > model.max_length:
        raise InputError(
            f"max_length {config.data.max_length:,} is beyond the model's range of "
            f"{model.max_length:,} tokens; lower --max-length"
        )
    tokenizer = pretrained.load_tokenizer(folder)
    training_text, held_out_text = split_held_out(load_documents(config.text))
    sampler = PasskeySampler(config.data, tokenizer, training_text, seed=config.seed)
    if sampler.largest_token >= model.vocab_size:
        raise InputError(
            f"the tokenizer makes token {sampler.largest_token:,}, the model has "
            f"{model.vocab_size:,}; do they belong together?"
        )
    work.check(config.folder(), config, operational=_OPERATIONAL)
    report_file = config.folder() / "report.md"
    if report_file.exists():
        print(report_file.read_text(encoding="utf-8"))
        print(f"This run was complete already; all of it is in {config.folder()}")
        return
    params = pretrained.load_params(folder, dtype=jnp.dtype(config.dtype))
    test = None
    if config.eval_samples:
        test = RetrievalTest(
            config.data,
            tokenizer,
            training_text,
            held_out_text,
            num_samples=config.eval_samples,
            seed=config.seed,
            implementation=config.implementation,
        )
    with contextlib.closing(
        work.WorkDir(config.folder(), config, operational=_OPERATIONAL)
    ) as workdir:
        state, step_seconds = _train(config, model, params, sampler, workdir)
        metrics = workdir.metrics()
    pattern = _pattern(config, state)
    save_pattern(pattern, workdir.path / "pattern")
    plots.save_gates(pattern, workdir.path / "gates.png", title=config.model)
    plots.save_history(metrics, workdir.path / "history.png", title=config.model)
    results = report.make(
        config=dataclasses.asdict(config),
        model=model,
        params=params,
        pattern=pattern,
        test=test,
        sparsities=config.eval_sparsities,
        random_seeds=config.eval_random_seeds,
    )
    results["seconds"] = {
        "per_training_step": step_seconds,
        "whole_command": round(time.monotonic() - started, 1),
    }
    report.save(results, workdir.path)
    print(report_file.read_text(encoding="utf-8"))
    print(f"Pattern, pictures and report are in {workdir.path}")


def _train(
    config: IdentifyConfig,
    model: ModelConfig,
    params,
    sampler: PasskeySampler,
    workdir: work.WorkDir,
) -> tuple[GateState, float | None]:
    """Train from the latest checkpoint to the last step; return the state and seconds a step."""
    step_config = StepConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        reg_weight=config.reg_weight,
        target_sparsity=config.target_sparsity,
        sink_size=config.sink,
        recent_size=config.recent,
        mixing=config.mixing,
        tail_size=min(sampler.longest_tail(), config.data.max_length),
        implementation=config.implementation,
    )
    step = jax.jit(functools.partial(train_step, model=model, config=step_config))
    state = workdir.restore(init_state(model, step_config))
    first, durations = int(state.step), []
    board = _summary_writer()(str(workdir.path / "tensorboard")) if config.tensorboard else None
    bar = tqdm(total=config.num_steps, initial=first, desc="identify", unit="step", disable=None)
    with bar, workdir.metrics_file.open("a", encoding="utf-8") as log:
        for index in range(first, config.num_steps):
            began = time.monotonic()
            sample = sampler.sample(index)
            batch = _batch(sample, _bucket(sample, config, step_config.tail_size))
            state, metrics = step(state, params, batch)
            values = {name: float(value) for name, value in metrics.items()}
            durations.append(time.monotonic() - began)
            if not np.isfinite(values["loss"]):
                raise InputError(
                    f"the loss is not finite at step {index} ({values['loss']}); if the model is "
                    "float16 or bfloat16, try --dtype float32"
                )
            record = {"step": index + 1, **values, "length": sample.tokens.size}
            log.write(json.dumps(record) + "\n")
            log.flush()
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
    return state, float(np.median(durations)) if durations else None


def _bucket(sample: Sample, config: IdentifyConfig, tail_size: int) -> int:
    width = -(-config.data.max_length // config.length_buckets)
    return max(-(-sample.tokens.size // width) * width, tail_size)


def _batch(sample: Sample, length: int) -> Batch:
    tokens = np.pad(sample.tokens, (0, length - sample.tokens.size))
    return Batch(
        tokens=jnp.asarray(tokens[None]),
        tail_start=jnp.array([sample.tail_start]),
        total_length=jnp.array([sample.tokens.size]),
    )


def _pattern(config: IdentifyConfig, state: GateState) -> Pattern:
    return Pattern(
        gates=np.asarray(state.gates, np.float64),
        sink_size=config.sink,
        recent_size=config.recent,
        extra={
            "model_name": config.model,
            "lr": config.learning_rate,
            "reg_weight": config.reg_weight,
            "target_sparsity": config.target_sparsity,
            "mixing": config.mixing,
            "num_steps": config.num_steps,
            "context_length_min": config.data.min_length,
            "context_length_max": config.data.max_length,
            "num_passkeys": config.data.num_passkeys,
            "seed": config.seed,
            "made_by": "duo_jax",
        },
    )


def _summary_writer():
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs: pip install 'duo_jax[tensorboard]'") from None
    return SummaryWriter
