"""Command line: head split, cache format and eviction, alone and together, on one axis of bytes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from tqdm import tqdm

from duo_jax import cli
from duo_jax.cache import cache_bytes
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.evaluate import eviction
from duo_jax.evaluate.compare import served
from duo_jax.evaluate.compare.methods import batches, score_answers, split_runtime
from duo_jax.evaluate.compare.tasks import Task, TaskName, make_task
from duo_jax.evaluate.frontier import report, search
from duo_jax.evaluate.frontier.settings import TASK, FrontierConfig, Setting
from duo_jax.evaluate.results import describe, grid
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.heads.pattern import Pattern, choose_retrieval_heads
from duo_jax.reports import machine
from duo_jax.schema.kinds import Fraction, Nats
from duo_jax.session.row_cache import whole_blocks
from duo_jax.session.runtime import Runtime

_DESCRIPTION = """\
Spend the bytes of a cache in all ways that this project has: some heads stream, keys and values
take fewer bits, retrieval heads keep fewer tokens. Measure bytes and answers of every combination
but those that can only be worse than one that was measured, draw the frontier, and name the best
setting for each budget, ready to be pasted into duo_jax.load.

Without flags this measures the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (evaluate.json) where it has one, else the command's own.
--sparsities, --kv-formats and --keeps take the place of --sparsity, --threshold, --kv and --keep,
which are refused.
"""
# Fields that decide which rows there are, not what is in them.
_ROW_CHOICE = ("workdir", "batch", "budgets", "sparsities", "kv_formats", "keeps", "tasks")


class StoredRow(TypedDict):
    """What is measured of a setting on a task; lists have an item per text."""

    exact: list[Fraction]
    tokens: list[Fraction]
    nll: list[Nats]
    kl: NotRequired[list[Nats]]  # from full caches; of those there is none
    cache_bytes: int


def evaluate(flags: FrontierConfig) -> None:
    """Measure what is missing; write JSON, tables and the picture.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    documents = load_documents(flags.text)
    pattern = grid.pattern_of(flags)
    if pattern is not None:
        sizes = {"sink_size": flags.sink, "recent_size": flags.recent}
        given = {name: size for name, size in sizes.items() if size is not None}
        pattern = dataclasses.replace(pattern, **given)
    settings = flags.settings()
    if pattern is None and any(setting.sparsity for setting in settings):
        raise InputError(
            "without a pattern no head streams: add --sparsities with nothing after it"
        )
    evicts = min(setting.keep for setting in settings)
    full = flags.load(
        pattern=NO_PATTERN, sink=None, recent=None, keep=evicts, keep_by=flags.keep_by
    )
    if flags.length > full.config.architecture.max_positions:
        raise InputError(
            f"length {flags.length:,} is beyond the model's range of "
            f"{full.config.architecture.max_positions:,}"
        )
    data = {"samples": flags.samples, "length": flags.length, "seed": flags.seed}
    tasks: dict[TaskName, Task] = {
        name: make_task(name, flags.data, full.tokenizer, documents, **data) for name in flags.tasks
    }
    identity = grid.identity(flags, full, documents)
    identity = {k: v for k, v in identity.items() if k not in _ROW_CHOICE}
    gates = None if pattern is None else pattern.gates.tolist()
    identity |= {"gates": gates, "sizes": _sizes(pattern), "keep_by": flags.keep_by}
    rows = Rows(flags.folder(), identity, kind=StoredRow)

    as_served = functools.partial(_served, full.runtime, pattern)
    batch = min(flags.batch, flags.samples)
    full_caches = functools.cache(lambda name: _predict(as_served(search.FULL), tasks[name], batch))
    measure = functools.partial(_measure, tasks=tasks, batch=batch, full_caches=full_caches)
    shares = {setting: _share(setting, as_served(setting), tasks) for setting in settings}
    points, skipped = [], []
    for setting in tqdm(search.in_order(settings, shares), desc=TASK, disable=None):
        why = search.why_skip(setting, shares[setting], points)
        if why is not None:
            skipped.append(why)
            continue
        for name in flags.tasks:
            if _key(setting, name) not in rows:
                rows.add(_key(setting, name), measure(setting, as_served(setting), name))
        points.append(_point(setting, rows, flags.tasks))
    described = describe.settings(flags, full)
    for name in ("retrieval_heads", "sparsity", "kv", "keep"):  # which differ between settings
        described.pop(name, None)
    described |= _sizes(pattern)
    result = {
        "command": machine.command("duo_jax.evaluate"),
        **described,
        "keep_by": flags.keep_by,
        "load": _chosen(flags),
        **data,
        "budgets": sorted(flags.budgets, reverse=True),
        "tasks": {
            name: {"in_words": task.in_words, "haystack": task.haystack}
            for name, task in tasks.items()
        },
        "rows": [
            dataclasses.asdict(point.setting) | {"task": name} | rows[_key(point.setting, name)]
            for point in points
            for name in flags.tasks
        ],
        "skipped": [
            dataclasses.asdict(why.setting) | {"share": shares[why.setting], "reason": why.reason}
            for why in skipped
        ],
    }
    report.write(flags.folder(), TASK, result, points, skipped)


def _sizes(pattern: Pattern | None) -> dict[str, int]:
    return {} if pattern is None else {"sink": pattern.sink_size, "recent": pattern.recent_size}


def _chosen(flags: FrontierConfig) -> dict[str, Any]:
    """Return the arguments of duo_jax.load that settings do not have and flags do."""
    given = {
        "sink_size": flags.sink,
        "recent_size": flags.recent,
        "dtype": flags.dtype,
        "weights": None if flags.weights == "model" else flags.weights,
        "prefill_mode": None if flags.prefill_mode == "exact" else flags.prefill_mode,
    }
    return {name: value for name, value in given.items() if value is not None}


def _served(full: Runtime, pattern: Pattern | None, setting: Setting) -> Runtime:
    """Return the model as a setting has it; weights that keep their order are shared."""
    found = full
    if pattern is not None and setting.sparsity:
        heads = choose_retrieval_heads(pattern.clipped(), sparsity=setting.sparsity)
        found = split_runtime(full, heads, (pattern.sink_size, pattern.recent_size))
    return dataclasses.replace(found, kv_format=setting.kv, keep=setting.keep)


def _share(setting: Setting, runtime: Runtime, tasks: dict[TaskName, Task]) -> float:
    """Return the bytes of a setting as a fraction of those of full caches, by its shapes."""
    found = []
    for task in tasks.values():
        size = task.length + task.room
        kept = size
        if setting.keep < 1:
            kept = whole_blocks(int(np.ceil(setting.keep * task.length)) + task.room)
        sizes = {"batch_size": 1, "dtype": runtime.dtype}
        some = cache_bytes(
            runtime.config, max_len=kept, kv=setting.kv, votes=setting.keep < 1, **sizes
        )
        found.append(some / cache_bytes(runtime.config.all_retrieval(), max_len=size, **sizes))
    return max(found)


def _predict(runtime: Runtime, task: Task, batch: int) -> list[eviction.Predicted]:
    return [
        served.predict(runtime, texts, tails, length=task.length, room=task.room)
        for texts, tails, _ in batches(task, batch)
    ]


def _measure(
    setting: Setting,
    runtime: Runtime,
    name: TaskName,
    *,
    tasks: dict[TaskName, Task],
    batch: int,
    full_caches: Callable[[TaskName], list[eviction.Predicted]],
) -> dict[str, Any]:
    """Answer the questions of a task in a setting."""
    task, reference = tasks[name], full_caches(name)
    found = reference if setting == search.FULL else _predict(runtime, task, batch)
    row = score_answers(runtime, task, found, full=reference, batch=batch)
    if setting == search.FULL:
        del row["kl"]
    return row | {"cache_bytes": max(answers.cache_bytes for answers in found)}


def _point(setting: Setting, rows: Rows, tasks: Sequence[TaskName]) -> search.Point:
    mine, full = ([rows[_key(s, name)] for name in tasks] for s in (setting, search.FULL))
    return search.joined(setting, mine, full)


def _key(setting: Setting, task: TaskName) -> str:
    return f"{task}: {setting.name}"


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        FrontierConfig,
        prog="python -m duo_jax.evaluate frontier",
        description=_DESCRIPTION,
        default=lambda: grid.default(FrontierConfig, TASK, args),
        args=args,
    )
