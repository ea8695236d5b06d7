"""Training the demo model from start to end: tokenizer, curriculum, test, model folder."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from duo_jax import files
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.cli.workdir import check as check_workdir
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.errors import InputError
from train import workdir as work
from train.demo_model import export, retrieval
from train.demo_model.config import TEMPLATES, DemoConfig, Stage
from train.demo_model.documents import DocumentSource
from train.demo_model.tokenizer import write_tokenizer
from train.demo_model.training import TrainState, answers_right, init_state, train_step

# May differ when a run is resumed: they do not change its result.
_OPERATIONAL = ("workdir", "output", "checkpoint_every", "test_samples", "test_lengths")


def train_demo_model(config: DemoConfig) -> None:
    """Train the demo model and write its folder; a second call resumes.

    Raises:
      InputError: a folder cannot be used, or the training does not learn to retrieve.
    """
    path, output = pathlib.Path(config.workdir), config.folder()
    check_workdir(path, config, operational=_OPERATIONAL)
    if files.exists(output) and (not files.is_folder(output) or any(output.iterdir())):
        raise InputError(f"{output} exists already; remove it, or choose another --output")
    training_text, held_out_text = split_held_out(load_documents([]))
    with (
        contextlib.closing(work.WorkDir(path, config, operational=_OPERATIONAL)) as workdir,
        tempfile.TemporaryDirectory(dir=path) as scratch,
    ):
        write_tokenizer(
            pathlib.Path(scratch),
            training_text,
            TEMPLATES,
            vocab_size=config.model.vocab_size,
            max_length=config.model.max_positions,
        )
        tokenizer = load_tokenizer(pathlib.Path(scratch))
        state = _train(config, tokenizer, training_text, workdir)
        params = export.rounded(state.params)
        print("Testing on held-out text ...")
        results = retrieval.test(
            config.model,
            params,
            tokenizer,
            training_text,
            held_out_text,
            lengths=config.test_lengths,
            num_samples=config.test_samples,
            seed=config.seed,
        )
        seconds = sum(m["seconds"] for m in workdir.metrics())
    summary = export.Summary(
        steps=int(state.step),
        seconds=seconds,
        seed=config.seed,
        table=retrieval.to_markdown(results),
    )
    with files.new_folder(output) as folder:
        export.write_model(folder, config.model, params, training_text, summary)
    print(summary.table)
    print(f"Trained in {seconds / 60:.1f} minutes, {summary.steps} steps. Model: {output}")


def _train(config: DemoConfig, tokenizer, text: list[str], workdir: work.WorkDir) -> TrainState:
    """Go through the curriculum, from the latest checkpoint on."""
    state = init_state(config.model, seed=config.seed, weight_decay=config.weight_decay)
    state = workdir.restore(state)
    update = functools.partial(
        train_step,
        model=config.model,
        filler_weight=config.filler_weight,
        weight_decay=config.weight_decay,
    )

    @functools.cache
    def sources(number: int) -> DocumentSource:
        stage = config.curriculum[number]
        return DocumentSource(stage, tokenizer, text, TEMPLATES, seed=config.seed)

    bar = tqdm(initial=int(state.step), desc="demo model", unit="step", disable=None)
    with bar:
        while int(state.stage) < len(config.curriculum):
            number = int(state.stage)
            stage = config.curriculum[number]
            check_batches = sources(number).check_batches()
            bar.set_description(f"stage {number + 1} of {len(config.curriculum)}")
            while int(state.stage) == number:
                began, step = time.monotonic(), int(state.step)
                rate = _learning_rate(config, stage, step, step - int(state.stage_start))
                batch = sources(_drawn_stage(config, number, step)).training_batch(step)
                state, metrics = update(
                    state, batch, jnp.float32(rate), rounded_kv=stage.rounded_kv
                )
                done = step + 1 - int(state.stage_start)
                checked = None
                if done % config.check_every == 0 or done == stage.max_steps:
                    right = [
                        answers_right(state.params, batch, model=config.model)
                        for batch in check_batches
                    ]
                    checked = float(np.mean(right))
                    state = _advance(state, stage, done, checked)
                values = {name: float(value) for name, value in metrics.items()}
                record = {"step": step + 1, "stage": number + 1, **values, "checked": checked}
                record["seconds"] = round(time.monotonic() - began, 3)
                workdir.log(record)
                bar.set_postfix(
                    loss=f"{values['loss']:.3f}",
                    right=f"{values['answers_right']:.3f}",
                    refresh=False,
                )
                bar.update()
                if (step + 1) % config.checkpoint_every == 0:
                    workdir.save(state)
    workdir.save(state)
    return state


def _drawn_stage(config: DemoConfig, number: int, step: int) -> int:
    """Return the stage that a step's documents come from: the present one, or an earlier one."""
    rng = np.random.default_rng([config.seed, step])
    if rng.random() < config.curriculum[number].rehearse:
        return int(rng.integers(number))
    return number


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


def _learning_rate(config: DemoConfig, stage: Stage, step: int, stage_step: int) -> float:
    rate = stage.learning_rate
    if stage.final_learning_rate is not None:
        rate += (stage.final_learning_rate - rate) * stage_step / stage.max_steps
    return rate * min(1.0, (step + 1) / config.warmup_steps)
