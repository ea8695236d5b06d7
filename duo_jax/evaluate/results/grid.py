"""Evaluations over a grid of lengths and depths, which needles and passkeys share.

Each asks for something that was hidden at a depth of a text of some length, and asks up to three
models: the model as published ("full"), the split one ("duo"), and one with every head streaming
("streaming").
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from tqdm import tqdm

from duo_jax.api import DuoModel
from duo_jax.checkpoints import pretrained
from duo_jax.cli import presets
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.cli.pattern import find_pattern
from duo_jax.data.documents import text_digest
from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.heads.pattern import Pattern, check_fits, load_pattern
from duo_jax.heads.split import DuoConfig
from duo_jax.schema.kinds import Count, Few, Many, Seed

PRESET_FILE = "evaluate.json"
FULL, DUO, STREAMING = "full", "duo", "streaming"
_MOST_LINES = 1_000  # lengths or depths
_MOST_TEXTS = 100_000

Flags = TypeVar("Flags", bound=ModelFlags)


@runtime_checkable
class GridCell(Protocol):
    """A text to be measured with one kind of caches."""

    @property
    def caches(self) -> str:
        """FULL, DUO or STREAMING."""
        ...

    @property
    def length(self) -> int:
        """Tokens of the text."""
        ...

    @property
    def key(self) -> str:
        """The name of its row."""
        ...

    @property
    def text(self) -> tuple[int | float, ...]:
        """What names the text, whatever the caches."""
        ...


SomeCell = TypeVar("SomeCell", bound=GridCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridFlags(ModelFlags):
    """Flags of evaluations over lengths and depths."""

    text: tuple[str, ...] = ()
    """Text to hide things in: files (.jsonl, .ndjson and .json hold texts as JSON; also packed,
    as .zst), folders, or the name of a Hugging Face data set. Default: the language reference that
    comes with Python (about 465 KB)."""
    lengths: tuple[Count, ...] = ()
    """Lengths of the texts, in tokens. Default: --num-lengths evenly spaced ones."""
    num_lengths: Few = 13
    """Number of evenly spaced lengths, where --lengths is not given."""
    min_length: Count | None = None
    """Shortest of the evenly spaced lengths. Default: the longest divided by --num-lengths, or the
    least that has room for the task."""
    max_length: Count | None = None
    """Longest of the evenly spaced lengths. Default: the model's range less room for the answer."""
    samples: Many = 1
    """Texts for each length (and depth)."""
    batch: Few = 1
    """Texts read at a time; more is faster and takes more memory."""
    full: bool = True
    """Also measure the model with a full cache for every head, in the model's own format, with the
    same --weights."""
    all_streaming: bool = False
    """Also measure the model with every head streaming, to show what the retrieval heads add."""
    seed: Seed = 0
    """Random seed of texts and of what is hidden in them; two runs with one seed agree exactly."""
    workdir: str | None = None
    """Folder of rows and results; the same command resumes from it. Default: runs/TASK-MODEL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.lengths)) != len(self.lengths):
            raise InputError("--lengths names a length twice")
        self.check_texts()

    def check_texts(self, *, per_length: int = 1) -> None:
        """Refuse a grid that is too large to be listed.

        Args:
          per_length: depths of each length.

        Raises:
          InputError: says how many texts there may be.
        """
        lengths = len(self.lengths) or self.num_lengths
        texts = lengths * per_length * self.samples
        if max(lengths, per_length) > _MOST_LINES or texts > _MOST_TEXTS:
            raise InputError(
                f"{lengths:,} lengths x {per_length:,} depths x {self.samples:,} samples: a grid "
                f"has at most {_MOST_LINES:,} lengths, as many depths, and {_MOST_TEXTS:,} texts"
            )

    def folder(self, task: str) -> pathlib.Path:
        """Return the work folder."""
        name = pathlib.PurePath(self.model.rstrip("/")).name
        return pathlib.Path(self.workdir or f"runs/{task}-{name}")

    def chosen_lengths(self, *, shortest: int, longest: int) -> list[int]:
        """Return the lengths of texts, in ascending order.

        Args:
          shortest: tokens that the task needs at least.
          longest: tokens that the model has room for.

        Raises:
          InputError: a length is out of this range.
        """
        if self.lengths:
            lengths = sorted(self.lengths)
        else:
            last = self.max_length or longest
            first = self.min_length or min(last, max(shortest, last // self.num_lengths))
            lengths = np.unique(np.linspace(first, last, self.num_lengths).astype(int)).tolist()
        if lengths[0] < shortest:
            raise InputError(f"length {lengths[0]:,}: this task needs at least {shortest:,} tokens")
        if lengths[-1] > longest:
            raise InputError(
                f"length {lengths[-1]:,}: with the answer the model has room for {longest:,} tokens"
            )
        return lengths


def models(flags: GridFlags, split: DuoModel) -> dict[str, Callable[[], DuoModel]]:
    """Return, by name, how to load each model to be measured; `split` is what the flags load."""
    config = split.config
    if config == config.all_retrieval() and flags.keep == 1:
        return {FULL: lambda: split}
    found = {DUO: lambda: split}
    if flags.full:
        as_published: dict[str, Any] = {"pattern": NO_PATTERN, "keep": 1.0, "kv": "model"}
        as_published |= dict.fromkeys(("sparsity", "threshold", "sink", "recent"))
        found = {FULL: functools.partial(flags.load, **as_published), **found}
    if flags.all_streaming:
        found[STREAMING] = functools.partial(flags.load, sparsity=1.0, threshold=None)
    return found


def fill(
    rows: Rows,
    cells: Sequence[SomeCell],
    measure: Callable[[DuoModel, list[SomeCell]], Sequence[Mapping[str, Any]]],
    loaders: Mapping[str, Callable[[], DuoModel]],
    *,
    batch: int,
    desc: str,
) -> None:
    """Measure the cells that have no row, up to `batch` of one length at a time.

    Models are loaded one after the other, in the order of the cells, and only where a cell needs
    one: each takes memory for its weights, beside the split model's. Full caches come first, and
    what they make of a text is what others are compared with: where a run was stopped between the
    two they are measured once more, and their row stays as it is.

    Args:
      rows: the rows that are done; new ones are added.
      cells: the grid, sorted by kind of caches and length.
      measure: returns a row for each of some cells; remembers what full caches make of them.
      loaders: by kind of caches.
      batch: most cells that are measured together.
      desc: name of the progress bar.
    """
    rows.note_older()
    missing = {cell.key for cell in cells if cell.key not in rows}
    done = len(cells) - len(missing)
    compared = {cell.text for cell in cells if cell.key in missing}
    wanted = [
        cell
        for cell in cells
        if cell.key in missing or (cell.caches == FULL and cell.text in compared)
    ]
    with tqdm(total=len(cells), initial=done, desc=desc, unit="text", disable=None) as bar:
        for caches, of_model in itertools.groupby(wanted, key=lambda cell: cell.caches):
            model = loaders[caches]()
            for _, of_length in itertools.groupby(of_model, key=lambda cell: cell.length):
                left = list(of_length)
                for first in range(0, len(left), batch):
                    part = left[first : first + batch]
                    for cell, row in zip(part, measure(model, part), strict=True):
                        if cell.key in missing:
                            rows.add(cell.key, row)
                            bar.update()
            del model  # before the next one is loaded


def identity(flags: ModelFlags, model: DuoModel, documents: Sequence[str]) -> dict[str, Any]:
    """Return all that rows depend on: the flags, what files hold, and which text is held out."""
    found = dataclasses.asdict(flags)
    if flags.keep == 1:  # runs of versions without eviction go on
        del found["keep"], found["keep_by"]
    return found | {
        "weights_digest": model.runtime.weights_digest,
        "text_digest": text_digest(documents),
        "split": _split(model.config),
    }


def _split(config: DuoConfig) -> dict[str, Any]:
    """Return what of a split neither flags nor weights say."""
    return {
        "retrieval_heads": list(config.retrieval_counts),
        "sink_size": config.sink_size,
        "recent_size": config.recent_size,
    }


def pattern_of(flags: ModelFlags) -> Pattern | None:
    """Return the pattern by which the flags split a model; None: by none.

    Raises:
      InputError: the model has none, or it does not fit the model.
    """
    if flags.pattern == NO_PATTERN:
        return None
    folder = pretrained.resolve(flags.model)
    architecture = pretrained.load_config(folder)
    pattern = load_pattern(flags.pattern or find_pattern(folder, architecture))
    check_fits(pattern, num_layers=architecture.num_layers, num_kv_heads=architecture.num_kv_heads)
    return pattern


def default(config_type: type[Flags], task: str, args: Sequence[str] | None) -> Flags:
    """Return the defaults of the model that a command line names.

    They are the fields under the task's name in the model's evaluate.json, where it has one.
    """
    return presets.defaults(
        args,
        config_type.model,
        lambda model, folder: presets.load(
            config_type(model=model), presets.file_of(folder, PRESET_FILE), part=task
        ),
    )
