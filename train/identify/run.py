"""Identification from start to end: load, train (or resume), save the pattern, report."""

import contextlib
import dataclasses
import time

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.cli.workdir import check as check_workdir
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import PasskeySampler
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, save_pattern
from train import workdir as work
from train.identify import plots, profile, report, training
from train.identify.config import IdentifyConfig, default_config
from train.retrieval_test import RetrievalTest

# Fields that may differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "checkpoint_every", "tensorboard")


def identify(config: IdentifyConfig) -> None:
    """Find the retrieval heads of a model and write everything a person wants to see of them.

    Writes to the work folder: config.json, metrics.jsonl, checkpoints/, pattern/ (gates in the
    published file format), gates.png, history.png (of training), report.json and report.md; prints
    the report.
    A second call resumes, or repeats the printed report if all is done.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    started = time.monotonic()
    if config.tensorboard:
        training.summary_writer()
    folder = pretrained.resolve(config.model)
    config.check_method(default_config(config.model, folder))
    model = pretrained.load_config(folder)
    if config.data.max_length > model.max_positions:
        raise InputError(
            f"max_length {config.data.max_length:,} is beyond the model's range of "
            f"{model.max_positions:,} tokens; lower --max-length"
        )
    tokenizer = pretrained.load_tokenizer(folder)
    training_text, held_out_text = split_held_out(load_documents(config.text))
    sampler = PasskeySampler(config.data, tokenizer, training_text, seed=config.seed)
    if sampler.largest_token >= model.vocab_size:
        raise InputError(
            f"the tokenizer makes token {sampler.largest_token:,}, the model has "
            f"{model.vocab_size:,}; do they belong together?"
        )
    check_workdir(config.folder(), config, operational=_OPERATIONAL)
    report_file = config.folder() / "report.md"
    if files.exists(report_file):
        print(files.read_text(report_file))
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
        find = profile.profile if config.method == "profile" else training.train
        gates, step_seconds = find(config, model, params, sampler, workdir)
        metrics = workdir.metrics()
    pattern = _pattern(config, gates)
    save_pattern(pattern, workdir.path / "pattern")
    pictures = {"title": config.model}
    if config.method == "profile":
        pictures["value"] = "attention far back (1: retrieval head)"
    else:
        plots.save_history(metrics, workdir.path / "history.png", title=config.model)
    plots.save_gates(pattern, workdir.path / "gates.png", **pictures)
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
        "per_sample" if config.method == "profile" else "per_training_step": step_seconds,
        "whole_command": round(time.monotonic() - started, 1),
    }
    report.save(results, workdir.path)
    print(files.read_text(report_file))
    print(f"Pattern, pictures and report are in {workdir.path}")


def _pattern(config: IdentifyConfig, gates: Float[np.ndarray, "layers kv_heads"]) -> Pattern:
    training = {
        "lr": config.learning_rate,
        "reg_weight": config.reg_weight,
        "target_sparsity": config.target_sparsity,
        "mixing": config.mixing,
        "num_steps": config.num_steps,
    }
    samples = {"num_samples": config.profile_samples}
    return Pattern(
        gates=np.asarray(gates, np.float64),
        sink_size=config.sink,
        recent_size=config.recent,
        extra={
            "model_name": config.model,
            "method": config.method,
            **(samples if config.method == "profile" else training),
            "context_length_min": config.data.min_length,
            "context_length_max": config.data.max_length,
            "num_passkeys": config.data.num_passkeys,
            "seed": config.seed,
            "made_by": "duo_jax",
        },
    )
