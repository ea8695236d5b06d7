"""Command line: DuoAttention beside other methods with small caches, at equal bytes."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from msgspec import Meta
from tqdm import tqdm

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.data.documents import load_documents
from duo_jax.data.passkey_templates import PasskeyTemplates
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError
from duo_jax.evaluate.compare import calibration, methods, report
from duo_jax.evaluate.compare.methods import FULL, Method, Subject
from duo_jax.evaluate.compare.points import StoredRow
from duo_jax.evaluate.compare.tasks import Task, TaskName, make_task
from duo_jax.evaluate.results import describe, grid
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.heads.reconstruction import Instruction
from duo_jax.reports import machine
from duo_jax.schema.kinds import Count, Few, Many, Seed

TASK = "compare"
_DESCRIPTION = """\
Compare retrieval at equal bytes of cache: DuoAttention with learned gates, with heads chosen by
attention profile and with random heads, StreamingLLM, the token-eviction methods H2O, TOVA, SnapKV,
FastGen, HeadKV and KVzip, and ThinK, ShadowKV and CHAI, which make keys smaller. Every method gets
the largest setting whose live buffers, with room for all questions and answers, stay within the
budget.

Without flags this measures the demo model that ships with duo_jax, in minutes. Defaults shown are
those of the model named by --model: its own preset (evaluate.json) where it has one, else the
command's own. Budgets and methods decide what is kept: --sparsity, --threshold, --kv and --keep are
refused.
"""
# Fields that decide which rows there are, not what is in them.
_ROW_CHOICE = ("workdir", "budgets", "tasks", "methods", "random_seeds")
_LISTS = ("--budgets", "--tasks", "--methods")
_RANDOM: Method = "random heads"
_PROFILE_ROW = "attention profile"
_CHAI: Method = "CHAI"
_CHAI_ROW = "CHAI's losses"


Budget = Annotated[float, Meta(gt=0.0, le=1.0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(ModelFlags):
    """Flags of the command."""

    budgets: tuple[Budget, ...] = (0.25, 0.5, 0.75, 1.0)
    """Budgets: bytes of keys and values, as fractions of those of full caches."""
    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """needle: one passkey; the question is compressed together with the text. passkeys: the text is
    compressed before several questions are asked, one after the other."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods to compare; full caches are always measured."""
    text: tuple[str, ...] = ()
    """Text to hide passkeys in: files (.jsonl, .ndjson and .json hold texts as JSON; also packed,
    as .zst), folders, or the name of a Hugging Face data set. Default: the language reference that
    comes with Python (about 465 KB)."""
    samples: Many = 32
    """Texts per task."""
    length: Count = 1024
    """Tokens of a text, with its questions and answers."""
    batch: Few = 16
    """Texts read at a time; more is faster and takes more memory."""
    random_seeds: Few = 3
    """Random choices of heads for the method "random heads"."""
    profile_samples: Many = 16
    """Training texts for the attention profile, which also gives HeadKV the importance of heads,
    and for the losses by which CHAI shares out its clusters."""
    seed: Seed = 0
    """Random seed of texts, passkeys and random heads; two runs with one seed agree exactly."""
    workdir: str | None = None
    """Folder of rows and results; the same command resumes from it. Default: runs/compare-MODEL."""
    data: Annotated[PasskeyTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PasskeyTemplates
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budgets", "tasks", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} must name one or more, each once")
        if self.sparsity is not None or self.threshold is not None:
            raise InputError(
                "--budgets decide how many heads stream; leave out --sparsity and --threshold"
            )
        if self.kv != "model":
            raise InputError("methods are compared with caches in the model's dtype: --kv model")
        if self.keep < 1:
            raise InputError("methods decide for themselves what is kept: leave out --keep")

    def folder(self) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/{TASK}-{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareCell:
    """A point of the comparison."""

    task: TaskName
    method: Method
    budget: float
    draw: int = 0  # of random heads

    @property
    def key(self) -> str:
        return f"{self.task} {self.method} {self.budget:g} draw {self.draw}"


def compare(flags: CompareConfig) -> None:
    """Measure what is missing; write JSON, tables and the picture.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    documents = load_documents(flags.text)
    split = flags.load()
    pattern = grid.pattern_of(flags)
    if pattern is None:
        raise InputError("there is nothing to compare without a pattern; choose one with --pattern")
    if flags.length > split.config.architecture.max_positions:
        raise InputError(
            f"length {flags.length:,} is beyond the model's range of "
            f"{split.config.architecture.max_positions:,}"
        )
    tasks: dict[TaskName, Task] = {
        name: make_task(
            name,
            flags.data,
            split.tokenizer,
            documents,
            samples=flags.samples,
            length=flags.length,
            seed=flags.seed,
        )
        for name in flags.tasks
    }
    sink, recent = split.config.sink_size, split.config.recent_size
    full = flags.load(pattern=NO_PATTERN, sink=None, recent=None)
    identity = grid.identity(flags, full, documents)
    identity = {k: v for k, v in identity.items() if k not in _ROW_CHOICE}
    identity |= {"gates": pattern.gates.tolist(), "sizes": [sink, recent]}
    rows = Rows(flags.folder(), identity, kind=StoredRow)
    sampler = functools.partial(
        calibration.training_sampler,
        *(flags.data, split, documents),
        length=flags.length,
        seed=flags.seed,
    )
    samples = {"samples": flags.profile_samples}
    if _PROFILE_ROW not in rows:
        found = calibration.profile(
            *(flags.model, split, sampler()),
            **samples,
            length=flags.length,
            implementation=flags.implementation,
        )
        rows.add(_PROFILE_ROW, {"scores": found.tolist()})
    if _CHAI in flags.methods and _CHAI_ROW not in rows:
        found = calibration.clustering_losses(full.runtime, sampler(), **samples)
        rows.add(_CHAI_ROW, {"scores": found.tolist()})
    subject = Subject(
        runtime=full.runtime,
        gates=pattern.clipped(),
        profile=np.array(rows[_PROFILE_ROW]["scores"]),
        sink=sink,
        recent=recent,
        special=tuple(split.tokenizer.all_special_ids),
        punctuation=methods.punctuation_tokens(split.tokenizer),
        clustering_losses=np.array(rows[_CHAI_ROW]["scores"] if _CHAI_ROW in rows else [[]]),
        instruction=Instruction.of(PieceEncoder(split.tokenizer).encode),
    )
    cells = _cells(flags)
    batch = min(flags.batch, flags.samples)
    full_caches = functools.cache(
        lambda name: methods.predict_with_full_caches(subject, tasks[name], batch=batch)
    )
    rows.note_older()
    done = sum(cell.key in rows for cell in cells)
    with tqdm(total=len(cells), initial=done, desc=TASK, unit="row", disable=None) as bar:
        for cell in cells:
            if cell.key not in rows:
                found = methods.measure(
                    subject,
                    tasks[cell.task],
                    cell.method,
                    cell.budget,
                    full=full_caches(cell.task),
                    batch=batch,
                    seed=flags.seed + cell.draw,
                )
                rows.add(cell.key, dataclasses.asdict(cell) | found)
                bar.update()
    result = _result(flags, split, tasks, [rows[cell.key] for cell in cells])
    report.write(flags.folder(), TASK, result)


def _cells(flags: CompareConfig) -> list[CompareCell]:
    cells = []
    for task in flags.tasks:
        cells.append(CompareCell(task=task, method=FULL, budget=1.0))
        for method in flags.methods:
            draws = flags.random_seeds if method == _RANDOM else 1
            cells += [
                CompareCell(task=task, method=method, budget=budget, draw=draw)
                for budget in sorted(flags.budgets)
                for draw in range(draws)
                if method != FULL
            ]
    return cells


def _result(
    flags: CompareConfig, split: DuoModel, tasks: dict[TaskName, Task], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    described = describe.settings(flags, split)
    for name in ("retrieval_heads", "sparsity"):  # which differ between methods
        del described[name]
    return {
        "command": machine.command("duo_jax.evaluate"),
        **described,
        "seed": flags.seed,
        "samples": flags.samples,
        "length": flags.length,
        "profile_samples": flags.profile_samples,
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
        default=lambda: grid.default(CompareConfig, TASK, args),
        args=args,
    )
