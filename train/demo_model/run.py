"""Training the demo model from start to end: tokenizer, curriculum, test, model folder."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from duo_jax import files
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.cli.workdir import check as check_workdir
from duo_jax.data.documents import load_documents, split_held_out, text_digest
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from train.demo_model import curriculum, export, retrieval
from train.demo_model.curriculum import CURRICULUM, MODEL, Stage
from train.demo_model.documents import Documents, DocumentSource
from train.demo_model.flags import DemoConfig
from train.demo_model.presets import TEMPLATES
from train.demo_model.tokenizer import write_tokenizer
from train.demo_model.training import TrainState, answers_right, init_state, train_step
from train.loop import run_steps
from train.workdir import WorkDir

# May differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "output", "checkpoint_every", "test_samples", "test_lengths")


def train_demo_model(
    flags: DemoConfig, *, architecture: ModelConfig = MODEL, stages: Sequence[Stage] = CURRICULUM
) -> None:
    """Train the demo model and write its folder; a second call resumes.

    Raises:
      InputError: a folder cannot be used, or the training does not learn to retrieve.
    """
    path, output = pathlib.Path(flags.workdir), flags.folder()
    documents = load_documents([])
    training_text, held_out_text = split_held_out(documents)
    settings = dataclasses.asdict(flags) | {
        "text_digest": text_digest(documents),  # that of this Python
        "model": dataclasses.asdict(architecture),
        "curriculum": [dataclasses.asdict(stage) for stage in stages],
    }
    check_workdir(path, settings, operational=_OPERATIONAL)
    if files.exists(output) and (not files.is_folder(output) or any(output.iterdir())):
        raise InputError(f"{output} exists already; remove it, or choose another --output")
    if max(flags.test_lengths, default=0) > architecture.max_positions:
        raise InputError(
            f"test length {max(flags.test_lengths):,} is beyond the model's range of "
            f"{architecture.max_positions:,} tokens"
        )
    with contextlib.closing(WorkDir(path, settings, operational=_OPERATIONAL)) as workdir:
        with files.new_folder(path / "tokenizer", replace=True) as folder:
            write_tokenizer(
                folder,
                training_text,
                TEMPLATES,
                vocab_size=architecture.vocab_size,
                max_length=architecture.max_positions,
            )
        tokenizer = load_tokenizer(path / "tokenizer")
        state = _train(flags, architecture, stages, tokenizer, training_text, workdir)
        params = export.rounded(state.params)
        print("Testing on held-out text ...")
        results = retrieval.test(
            architecture,
            params,
            tokenizer,
            training_text,
            held_out_text,
            lengths=flags.test_lengths,
            num_samples=flags.test_samples,
            seed=flags.seed,
        )
        seconds = sum(m.get("seconds") or 0.0 for m in workdir.metrics())
    summary = export.Summary(
        steps=int(state.step),
        seconds=seconds,
        seed=flags.seed,
        table=retrieval.to_markdown(results),
    )
    with files.new_folder(output) as folder:
        export.write_model(folder, architecture, params, training_text, summary)
    print(summary.table)
    print(f"Trained in {seconds / 60:.1f} minutes, {summary.steps} steps. Model: {output}")


def _train(
    flags: DemoConfig,
    architecture: ModelConfig,
    stages: Sequence[Stage],
    tokenizer: Any,
    text: list[str],
    workdir: WorkDir,
) -> TrainState:
    """Go through the curriculum, from the latest checkpoint on."""

    @functools.cache
    def source(number: int) -> DocumentSource:
        return DocumentSource(stages[number], tokenizer, text, TEMPLATES, seed=flags.seed)

    @functools.cache
    def check_batches(number: int) -> list[Documents]:
        return source(number).check_batches()

    def one_step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        began, number, index = time.monotonic(), int(state.stage), int(state.step)
        stage, stage_step = stages[number], index - int(state.stage_start)
        bar.set_description(f"stage {number + 1} of {len(stages)}", refresh=False)
        rate = curriculum.learning_rate(
            stage, step=index, stage_step=stage_step, warmup_steps=flags.warmup_steps
        )
        drawn = curriculum.drawn_stage(stages, number, step=index, seed=flags.seed)
        state, metrics = train_step(
            state,
            source(drawn).training_batch(index),
            jnp.float32(rate),
            architecture=architecture,
            filler_weight=flags.filler_weight,
            weight_decay=flags.weight_decay,
            rounded_kv=stage.rounded_kv,
        )
        done, checked = stage_step + 1, None
        if done % flags.check_every == 0 or done == stage.max_steps:
            right = [
                answers_right(state.params, batch, architecture=architecture)
                for batch in check_batches(number)
            ]
            checked = float(np.mean(right))
            state = _advance(state, stage, done, checked)
        values = {name: float(value) for name, value in metrics.items()}
        return state, {
            "stage": number + 1,
            **values,
            "checked": checked,
            "seconds": round(time.monotonic() - began, 3),
        }

    state = workdir.restore(
        init_state(architecture, seed=flags.seed, weight_decay=flags.weight_decay)
    )
    bar = tqdm(initial=int(state.step), desc="demo model", unit="step", disable=None)
    state, _ = run_steps(
        workdir,
        state,
        one_step,
        bar,
        finished=lambda state: int(state.stage) >= len(stages),
        checkpoint_every=flags.checkpoint_every,
        shown=("loss", "answers_right"),
    )
    return state


def _advance(state: TrainState, stage: Stage, done: int, right: float) -> TrainState:
    """Move on to the next stage if this one is over."""
    if stage.threshold is not None and right < stage.threshold:
        if done < stage.max_steps:
            return state
        raise InputError(
            f"stage {int(state.stage) + 1} predicts {right:.1%} of the passkey tokens after {done} "
            f"steps, {stage.threshold:.1%} are needed; try another --seed"
        )
    if stage.threshold is None and done < stage.max_steps:
        return state
    return dataclasses.replace(state, stage=state.stage + 1, stage_start=state.step)
