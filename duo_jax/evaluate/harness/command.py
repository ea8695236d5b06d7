"""Command line: tasks of lm-evaluation-harness, answered from the caches of a split model."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import tempfile
from typing import Any

from duo_jax import cli, files
from duo_jax.api import DuoModel
from duo_jax.checkpoints import gguf, pretrained
from duo_jax.errors import InputError
from duo_jax.evaluate.harness.flags import LmEvalFlags
from duo_jax.reports import machine
from duo_jax.schema.kinds import Count

_DESCRIPTION = """\
Run tasks of lm-evaluation-harness (RULER, LongBench, MMLU, ... or your own) on a split model.
Answers come from the caches that serve the model: contexts are read in chunks; their last tokens,
and all tokens after them, are decoded one by one.

Needs the extra "eval": pip install "duo_jax[eval]". Tasks with local data open no connection.
"""
# Bootstrap draws for standard errors that have no formula. lm-eval's own 100,000 take minutes,
# unless it forks processes for them, and a process that runs jax must not be forked.
_BOOTSTRAPS = 1000
_SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own: Python, numpy, torch, examples of a context


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalConfig(LmEvalFlags):
    """Flags of the command."""

    tasks: str | None = None
    """Tasks, groups or tags, separated by commas; * matches anything. Default: all tasks of
    --include-path. `lm-eval ls tasks` lists those that come with the harness."""
    include_path: pathlib.Path | None = None
    """Folder with more tasks, as YAML files in the harness's format."""
    limit: int | None = None
    """Documents per task. Default: all."""
    num_fewshot: int | None = None
    """Examples in each context. Default: the task's own number."""
    apply_chat_template: bool = False
    """Render contexts with the model's chat template, each example as a turn of its own."""
    system_instruction: str | None = None
    """System message of the chat."""
    gen_kwargs: str | None = None
    """Generation arguments in place of the tasks' own, such as temperature=0.7,max_gen_toks=64.
    Known: until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p, repetition_penalty."""
    lengths: tuple[Count, ...] = ()
    """Lengths, in tokens, of the contexts that tasks such as RULER's generate. Default: the task's
    own (4,096)."""
    run_unsafe_code: bool = False
    """Allow tasks, such as mbpp, that run code which the model writes."""
    seed: int | None = None
    """Random seed. Default: lm-eval's own seeds, so that scores can be compared."""
    log_samples: bool = False
    """Also write every question and answer."""
    answers: pathlib.Path | None = None
    """Folder where answers are kept as they come, so that a stopped run resumes. Runs with another
    model, split or flags have their own answers."""
    out: pathlib.Path = pathlib.Path("lm-eval.json")
    """File for the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks is None and self.include_path is None:
            raise InputError("name --tasks, or a folder of tasks with --include-path")
        if self.include_path is not None and not files.is_folder(self.include_path):
            raise InputError(f"{self.include_path} is not a folder; --include-path takes one")
        for name in ("limit", "num_fewshot", "seed"):
            value, least = getattr(self, name), int(name == "limit")
            if value is not None and not least <= value < 2**32:
                raise InputError(f"{name} {value} is not from {least} to 2^32")


def evaluate(flags: LmEvalConfig) -> None:
    """Run the tasks; write JSON and print the harness's table.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm-evaluation-harness is not installed: pip install "duo_jax[eval]"')
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # see _BOOTSTRAPS
    files.make_folder(flags.out.parent)
    files.check_file(flags.out)
    if flags.answers is not None:
        files.make_folder(flags.answers)
    with tempfile.TemporaryDirectory() as scratch:
        manager, names = _find_tasks(flags, tokenizer_folder(flags.model, scratch))
        results = _run(flags, manager, _load_tasks(flags, manager, names))
    files.write_text(flags.out, _to_json(results))
    print(_tables(results))
    info = results["config"]
    if info["cache_bytes_per_row"] is not None:
        print(
            f"largest cache of a row: {info['cache_bytes_per_row'] / 1e6:,.3f} MB, with room for "
            f"{info['cache_tokens_per_row']:,} tokens; results: {flags.out}"
        )


def tokenizer_folder(model: str, scratch: str) -> str:
    """Return a folder from which the harness's generators can load the tokenizer by themselves."""
    folder = pretrained.resolve(model)
    if not gguf.is_gguf(folder):
        return str(folder)
    pretrained.load_tokenizer(folder).save_pretrained(scratch)
    return scratch


def _find_tasks(flags: LmEvalConfig, tokenizer: str) -> tuple[Any, list[str]]:
    """Return the harness's TaskManager, and the names of the tasks, groups and tags to run.

    Raises:
      InputError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    # For the harness's generators: their tokenizer, and the lengths of contexts.
    metadata: dict[str, Any] = {"tokenizer": tokenizer}
    if flags.lengths:
        metadata["max_seq_lengths"] = list(flags.lengths)
    options: dict[str, Any] = {"include_path": flags.include_path and str(flags.include_path)}
    manager = TaskManager(**options, include_defaults=False, metadata=metadata)
    if flags.tasks is None:
        if not manager.all_tasks:
            raise InputError(f"{flags.include_path} holds no task (*.yaml)")
        names = manager.all_subtasks or manager.all_groups
    else:
        names = [name.strip() for name in flags.tasks.split(",") if name.strip()]
    found = {name: manager.match_tasks([name]) for name in names}
    # The thousands that come with the harness take seconds to list; a group may name some of them.
    if not all(found.values()) or manager.all_groups:
        manager = TaskManager(**options, metadata=metadata)
        found = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        raise InputError(f"no such task: {', '.join(unknown)} (`lm-eval ls tasks` lists them)")
    return manager, list(dict.fromkeys(name for matches in found.values() for name in matches))


def _load_tasks(flags: LmEvalConfig, manager: Any, names: list[str]) -> list[Any]:
    """Return the harness's Task and Group objects, their data loaded or generated.

    Raises:
      InputError: the data of one cannot be had, or it runs code and may not.
    """
    loaded: list[Any] = []
    for name in names:
        try:
            part = manager.load([name])
            group = part["groups"].get(name)
            # A tag is the list of its tasks.
            loaded += [group] if group is not None else part["tasks"].values()
            everything = manager.load(loaded)  # refuses a task that stands here twice
        except Exception as error:  # whatever its code, its data set or the network may raise
            said = str(error).strip().splitlines() or [""]
            raise InputError(
                f"task {name} cannot be loaded ({type(error).__name__}: {said[0]})"
            ) from error
    unsafe = [
        name for name, task in everything["tasks"].items() if getattr(task, "UNSAFE_CODE", False)
    ]
    if unsafe and not flags.run_unsafe_code:
        raise InputError(
            f"{', '.join(unsafe)}: runs code that the model writes; allow it with --run-unsafe-code"
        )
    return loaded


def _run(flags: LmEvalConfig, manager: Any, tasks: list[Any]) -> dict[str, Any]:
    """Return lm-eval's results, with the settings of our model under "duo_jax"."""
    from lm_eval.evaluator import simple_evaluate

    from duo_jax.evaluate.harness.model import DuoLM  # imports lm-eval

    model = flags.load()
    lm = DuoLM(model, flags, seed=flags.seed or 0)
    seeds = _SEEDS if flags.seed is None else (flags.seed,) * len(_SEEDS)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=flags.num_fewshot,
        batch_size=flags.batch_size,
        use_cache=None if flags.answers is None else str(flags.answers / _digest(flags, model)),
        limit=flags.limit,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=flags.log_samples,
        system_instruction=flags.system_instruction,
        apply_chat_template=flags.apply_chat_template,
        fewshot_as_multiturn=flags.apply_chat_template,
        gen_kwargs=flags.gen_kwargs,
        confirm_run_unsafe_code=flags.run_unsafe_code,
        **dict(zip(names, seeds, strict=True)),
    )
    assert results is not None  # as there is only one process
    return results | {
        "command": machine.command("duo_jax.evaluate"),
        "seed": flags.seed,
        "duo_jax": lm.get_model_info(),
    }


def _digest(flags: LmEvalConfig, model: DuoModel) -> str:
    """Return a name for all that an answer depends on besides its question."""
    values = {f.name: getattr(flags, f.name) for f in dataclasses.fields(LmEvalFlags)}
    # The digest of the weights and the split stand for model and pattern.
    for name in ("model", "pattern", "batch_size"):
        del values[name]
    runtime = model.runtime
    parts = [values, flags.seed, model.config, runtime.weights_digest, str(runtime.dtype)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _to_json(results: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable) + "\n"


def _tables(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    parts = ["results", *(["groups"] if "groups" in results else [])]
    return "\n".join(make_table(results, column=part) for part in parts)


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        LmEvalConfig,
        prog="python -m duo_jax.evaluate lm-eval",
        description=_DESCRIPTION,
        args=args,
    )
