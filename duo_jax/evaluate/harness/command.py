"""Command line: tasks of lm-evaluation-harness, answered through the duo caches."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
from typing import Any

from duo_jax import cli, files
from duo_jax.api import DuoModel
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.evaluate.harness.flags import LmEvalFlags
from duo_jax.reports import machine

_DESCRIPTION = """\
Run tasks of lm-evaluation-harness (RULER, LongBench, MMLU, ... or your own) on a split model. Its
answers come from the caches that serve: contexts are read in chunks, their last tokens and all that
follows are decoded one by one.

Needs the extra "eval": pip install "duo_jax[eval]". Tasks whose data lies here open no connection.
"""
# Draws for standard errors that have no formula; lm-eval's own 100,000 take minutes without the
# processes that it forks for them, and a process that runs jax must not be forked.
_BOOTSTRAPS = 1000
_SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own: Python, numpy, torch, examples of a context


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalConfig(LmEvalFlags):
    """Flags of the command."""

    tasks: str | None = None
    """Names of tasks, groups or tags, with commas between; * stands for anything. Default: all
    tasks of --include-path. `lm-eval ls tasks` lists those that come with the harness."""
    include_path: pathlib.Path | None = None
    """A folder of further tasks (YAML files in the harness's format)."""
    limit: int | None = None
    """Documents of each task. Default: all."""
    num_fewshot: int | None = None
    """Examples in a context. Default: the task's own."""
    apply_chat_template: bool = False
    """Put contexts into the model's chat template, examples as turns of their own."""
    system_instruction: str | None = None
    """What the system says in the chat."""
    gen_kwargs: str | None = None
    """Generation arguments instead of the tasks' own, such as temperature=0.7,max_gen_toks=64."""
    lengths: tuple[int, ...] = ()
    """Tokens of contexts that a task generates, as RULER's do. Default: the task's own (4,096)."""
    run_unsafe_code: bool = False
    """Allow tasks that run the code the model writes, such as mbpp."""
    seed: int | None = None
    """Of everything that is drawn. Default: lm-eval's own seeds, for numbers to compare."""
    log_samples: bool = False
    """Write every question and answer too."""
    answers: pathlib.Path | None = None
    """A folder where answers are kept as they come, so that a run that was stopped goes on. Other
    models, splits and flags do not see each other's."""
    out: pathlib.Path = pathlib.Path("lm-eval.json")
    """Where to write the results."""

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
        if min(self.lengths, default=1) < 1:
            raise InputError(f"lengths {self.lengths} must be at least 1")


def evaluate(config: LmEvalConfig) -> None:
    """Run the tasks; write JSON and print the harness's table.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm-evaluation-harness is not installed: pip install "duo_jax[eval]"')
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # see _BOOTSTRAPS
    files.make_folder(config.out.parent)
    manager, names = _find_tasks(config)
    results = _run(config, manager, _load_tasks(config, manager, names))
    files.write_text(config.out, _to_json(results))
    print(_tables(results))
    info = results["config"]
    if info["cache_bytes_per_row"] is not None:
        print(
            f"largest cache of a row: {info['cache_bytes_per_row'] / 1e6:,.3f} MB, with room for "
            f"{info['cache_tokens_per_row']:,} tokens; results: {config.out}"
        )


def _find_tasks(config: LmEvalConfig) -> tuple[Any, list[str]]:
    """Return the harness's TaskManager, and the names of the tasks, groups and tags to run.

    Raises:
      InputError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    # Where the harness's generators find a tokenizer, and what they are to make.
    metadata: dict[str, Any] = {"tokenizer": str(pretrained.resolve(config.model))}
    if config.lengths:
        metadata["max_seq_lengths"] = list(config.lengths)
    options = {"include_path": config.include_path and str(config.include_path)}
    manager = TaskManager(**options, include_defaults=False, metadata=metadata)
    if config.tasks is None:
        if not manager.all_tasks:
            raise InputError(f"{config.include_path} holds no task (*.yaml)")
        names = manager.all_subtasks or manager.all_groups
    else:
        names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    found = {name: manager.match_tasks([name]) for name in names}
    # The thousands that come with the harness take seconds to list; a group may name some of them.
    if not all(found.values()) or manager.all_groups:
        manager = TaskManager(**options, metadata=metadata)
        found = {name: manager.match_tasks([name]) for name in names}
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        raise InputError(f"no such task: {', '.join(unknown)} (`lm-eval ls tasks` lists them)")
    return manager, list(dict.fromkeys(name for matches in found.values() for name in matches))


def _load_tasks(config: LmEvalConfig, manager: Any, names: list[str]) -> list[Any]:
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
    if unsafe and not config.run_unsafe_code:
        raise InputError(
            f"{', '.join(unsafe)}: runs code that the model writes; allow it by --run-unsafe-code"
        )
    return loaded


def _run(config: LmEvalConfig, manager: Any, tasks: list[Any]) -> dict[str, Any]:
    """Return lm-eval's results, with what they were measured with in "duo_jax"."""
    from lm_eval.evaluator import simple_evaluate

    from duo_jax.evaluate.harness.model import DuoLM  # imports lm-eval

    model = config.load()
    lm = DuoLM(model, config, seed=config.seed or 0)
    seeds = _SEEDS if config.seed is None else (config.seed,) * len(_SEEDS)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        use_cache=None if config.answers is None else str(config.answers / _digest(config, model)),
        limit=config.limit,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=config.log_samples,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.apply_chat_template,
        gen_kwargs=config.gen_kwargs,
        confirm_run_unsafe_code=config.run_unsafe_code,
        **dict(zip(names, seeds, strict=True)),
    )
    return results | {
        "command": machine.command("duo_jax.evaluate"),
        "seed": config.seed,
        "duo_jax": lm.get_model_info(),
    }


def _digest(config: LmEvalConfig, model: DuoModel) -> str:
    """Return a name for all that an answer depends on besides its question."""
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(LmEvalFlags)}
    for name in ("model", "pattern", "batch_size"):  # the model's numbers and heads stand for it
        del flags[name]
    parts = [flags, model.config, model.runtime.weights_digest, str(model.runtime.dtype)]
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
