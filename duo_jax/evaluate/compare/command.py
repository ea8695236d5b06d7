"""Command line: DuoAttention beside other ways to a smaller cache, at equal bytes."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from tqdm import tqdm

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.checkpoints import pretrained
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler
from duo_jax.errors import InputError
from duo_jax.evaluate.compare import (
    methods as compare_methods,
)
from duo_jax.evaluate.compare import (
    report as compare_report,
)
from duo_jax.evaluate.compare import (
    tasks as compare_tasks,
)
from duo_jax.evaluate.compare.methods import FULL, Method, Model
from duo_jax.evaluate.compare.tasks import Task, TaskName
from duo_jax.evaluate.results import describe as settings
from duo_jax.evaluate.results import grid
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads import attention_profile as profiling
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.heads.pattern import Pattern, check_fits, load_pattern
from duo_jax.reports import machine

TASK = "compare"
_DESCRIPTION = """\
Retrieval at equal bytes of cache: DuoAttention with learned gates, with heads by attention profile
and with random ones, StreamingLLM, and the token-eviction methods H2O, TOVA, SnapKV, FastGen and
HeadKV. Every method gets the largest setting whose live buffers, with room for all that is asked,
stay within the budget.

Without flags this measures the demo model that ships with duo_jax, in minutes. Defaults shown are
those of the model named by --model: its own preset (evaluate.json) where it has one.
"""
# Fields that say which rows there are, not what is in them.
_OF_THE_WHOLE = ("workdir", "budgets", "tasks", "methods", "random_seeds")
_LISTS = ("--budgets", "--tasks", "--methods")
_RANDOM: Method = "random heads"
_PROFILE_ROW = "attention profile"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(ModelFlags):
    """Flags of the command."""

    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Bytes of keys and values, as fractions of those of full caches."""
    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """needle: one passkey, the question is compressed with the text. passkeys: the text is
    compressed before several questions come, one after the other."""
    methods: tuple[Method, ...] = get_args(Method)
    """What to compare; full is measured always."""
    text: tuple[str, ...] = ()
    """Files, folders, .jsonl or .jsonl.zst, or a Hugging Face data set to hide passkeys in.
    Default: the language reference that comes with Python (about 465 KB)."""
    samples: int = 32
    """Texts per task."""
    length: int = 1024
    """Tokens of a text, questions and answers included."""
    batch: int = 16
    """Texts that are read at once: more is faster and takes more memory."""
    random_seeds: int = 3
    """Draws of random heads."""
    profile_samples: int = 16
    """Training texts of the attention profile, which also tells HeadKV how important heads are."""
    seed: int = 0
    """Of texts, passkeys and random heads; two runs of a seed agree exactly."""
    workdir: str | None = None
    """Where rows and results go; started again, the command goes on from there.
    Default: runs/compare- and the model's name."""
    data: Annotated[PasskeyTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PasskeyTemplates
    )

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch", "random_seeds", "profile_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} must not be negative")
        for name in ("budgets", "tasks", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} must name one or more, each once")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"budget {budget} is not in (0, 1]")
        if self.sparsity is not None or self.threshold is not None:
            raise InputError("--budgets say how many heads stream: no --sparsity or --threshold")
        if self.kv != "model":
            raise InputError("methods are compared with caches in the model's dtype: --kv model")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/{TASK}-{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A point of the comparison."""

    task: TaskName
    method: Method
    budget: float
    draw: int = 0  # of random heads

    @property
    def key(self) -> str:
        return f"{self.task} {self.method} {self.budget:g} draw {self.draw}"


def compare(config: CompareConfig) -> None:
    """Measure what is missing; write JSON, tables and the picture.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    documents = load_documents(config.text)
    split = config.load()
    pattern = _pattern(config)
    if config.length > split.config.architecture.max_positions:
        raise InputError(
            f"length {config.length:,} is beyond the model's range of "
            f"{split.config.architecture.max_positions:,}"
        )
    tasks = {
        name: compare_tasks.make(
            name,
            config.data,
            split.tokenizer,
            documents,
            samples=config.samples,
            length=config.length,
            seed=config.seed,
        )
        for name in config.tasks
    }
    plain = config.load(pattern=NO_PATTERN, sink=None, recent=None)
    identity = grid.identity(config, plain, documents)
    identity = {k: v for k, v in identity.items() if k not in _OF_THE_WHOLE}
    rows = Rows(config.folder(), identity | {"gates": pattern.gates.tolist()})
    if _PROFILE_ROW not in rows:
        rows.add(_PROFILE_ROW, {"scores": _profile(config, split, documents)})
    model = Model(
        runtime=plain.runtime,
        gates=pattern.clipped(),
        profile=np.array(rows[_PROFILE_ROW]["scores"]),
        sink=split.config.sink_size,
        recent=split.config.recent_size,
        special=tuple(split.tokenizer.all_special_ids),
        punctuation=compare_methods.punctuation_tokens(split.tokenizer),
    )
    cells = _cells(config)
    done = sum(cell.key in rows for cell in cells)
    with tqdm(total=len(cells), initial=done, desc=TASK, unit="row", disable=None) as bar:
        for cell in cells:
            if cell.key not in rows:
                rows.add(cell.key, _measure(config, model, tasks[cell.task], cell))
                bar.update()
    result = _result(config, split, tasks, [rows[cell.key] for cell in cells])
    compare_report.report(config.folder(), TASK, result)


def _measure(config: CompareConfig, model: Model, task: Task, cell: Cell) -> dict[str, Any]:
    found = compare_methods.measure(
        model,
        task,
        cell.method,
        cell.budget,
        batch=min(config.batch, config.samples),
        seed=config.seed + cell.draw,
    )
    return dataclasses.asdict(cell) | found


def _cells(config: CompareConfig) -> list[Cell]:
    cells = []
    for task in config.tasks:
        cells.append(Cell(task=task, method=FULL, budget=1.0))
        for method in config.methods:
            draws = config.random_seeds if method == _RANDOM else 1
            cells += [
                Cell(task=task, method=method, budget=budget, draw=draw)
                for budget in sorted(config.budgets)
                for draw in range(draws)
                if method != FULL
            ]
    return cells


def _result(
    config: CompareConfig, split: DuoModel, tasks: dict[TaskName, Task], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    described = settings.describe(config, split)
    for of_one_split in ("retrieval_heads", "sparsity"):
        del described[of_one_split]
    return {
        "command": machine.command("duo_jax.evaluate"),
        **described,
        "seed": config.seed,
        "samples": config.samples,
        "length": config.length,
        "profile_samples": config.profile_samples,
        "tasks": {
            name: {
                "in_words": task.in_words,
                "haystack": task.haystack,
                "text_tokens": task.length,
                "asked_tokens": task.room,
            }
            for name, task in tasks.items()
        },
        "rows": rows,
    }


def _pattern(config: CompareConfig) -> Pattern:
    """Return the learned gates."""
    if config.pattern == NO_PATTERN:
        raise InputError("there is nothing to compare without a pattern: name one with --pattern")
    folder = pretrained.resolve(config.model)
    pattern = load_pattern(config.pattern or folder / "pattern")
    model = pretrained.load_config(folder)
    check_fits(pattern, num_layers=model.num_layers, num_kv_heads=model.num_kv_heads)
    return pattern


def _profile(config: CompareConfig, split: DuoModel, documents: Sequence[str]) -> list[list[float]]:
    """Return the attention profile, on training text."""
    data = PasskeyConfig(**dataclasses.asdict(config.data), min_length=1, max_length=config.length)
    sampler = PasskeySampler(data, split.tokenizer, split_held_out(documents)[0], seed=config.seed)
    params = pretrained.load_params(pretrained.resolve(config.model), dtype=split.runtime.dtype)
    scores = profiling.attention_profile(
        split.config.architecture,
        params,
        [sampler.sample(i, length=config.length) for i in range(config.profile_samples)],
        sink_size=split.config.sink_size,
        recent_size=split.config.recent_size,
        implementation=split.runtime.implementation,
    )
    return scores.tolist()


def _spaced(args: Sequence[str]) -> list[str]:
    """Return the words of a command line with lists such as "0.25,0.5" taken apart."""
    words, in_list = [], False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in _LISTS and equals:
            words += [flag, *value.split(",")]
            in_list = True
        elif in_list and not arg.startswith("--"):
            words += [part for part in arg.split(",") if part]
        else:
            words.append(arg)
            in_list = arg in _LISTS
    return words


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    args = _spaced(sys.argv[1:] if args is None else args)
    cli.run(
        compare,
        CompareConfig,
        prog="python -m duo_jax.evaluate compare",
        description=_DESCRIPTION,
        default=grid.default(CompareConfig, TASK, args),
        args=args,
    )
