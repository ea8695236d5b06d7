"""Command line: a needle at every depth of texts of every length, and the heat map of it."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.cache import live_bytes
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.evaluate.needle.documents import Document, Haystack, NeedleTemplates
from duo_jax.evaluate.results import describe as settings
from duo_jax.evaluate.results import grid, heat_map, scores
from duo_jax.evaluate.results.grid import GridFlags
from duo_jax.evaluate.results.rows import Rows
from duo_jax.reports import machine
from duo_jax.session.session import Session
from duo_jax.session.text import write_text

TASK = "needle"
_DESCRIPTION = """\
Hide a fact at every depth of texts of every length, and ask for it: the heat map of the
DuoAttention paper, with full caches and with split ones side by side.

Without flags this measures the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (evaluate.json) where it has one, else the paper's grid.
"""
# Fields that do not change a row.
_OPERATIONAL = ("workdir", "full", "all_streaming")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig(GridFlags):
    """Flags of the command."""

    depths: tuple[float, ...] = ()
    """Where the needle is hidden, 0 (beginning) to 1 (end). Default: --num-depths of them."""
    num_depths: int = 10
    """How many depths, evenly spaced from 0 to 1, where --depths does not name them."""
    max_new_tokens: int = 50
    """Tokens that are written after the question, greedily."""
    chat: bool = False
    """Put text and question into a message of the model's chat template."""
    needle: Annotated[NeedleTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=NeedleTemplates
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_depths", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"depth {depth} is not in [0, 1]")
        if len(set(self.depths)) != len(self.depths):
            raise InputError("a depth stands twice in --depths")

    def chosen_depths(self) -> list[float]:
        """Return the depths, in ascending order."""
        return sorted(self.depths) or np.linspace(0, 1, self.num_depths).round(4).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One text to be measured."""

    caches: str  # grid.FULL, grid.DUO or grid.STREAMING
    length: int
    depth: float
    sample: int

    @property
    def key(self) -> str:
        return f"{self.caches} length {self.length} depth {self.depth} sample {self.sample}"


def evaluate(config: NeedleConfig) -> None:
    """Measure what is missing; write JSON, a table and the heat map.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    folder = config.folder(TASK)
    documents = load_documents(config.text)
    split = config.load()
    haystack = Haystack(
        config.needle, split.tokenization, documents, seed=config.seed, chat=config.chat
    )
    lengths = config.chosen_lengths(
        shortest=haystack.shortest() + 1,
        longest=split.config.architecture.max_positions - config.max_new_tokens,
    )
    rows = Rows(folder, grid.identity(config, split, documents), operational=_OPERATIONAL)
    loaders = grid.models(config, split)
    cells = [
        Cell(caches=caches, length=length, depth=depth, sample=sample)
        for caches in loaders
        for length in lengths
        for depth in config.chosen_depths()
        for sample in range(config.samples)
    ]

    def measure(model: DuoModel, some: list[Cell]) -> list[dict[str, Any]]:
        texts = [
            haystack.document(length=cell.length, depth=cell.depth, sample=cell.sample)
            for cell in some
        ]
        answered = _answer(config, model, texts, longest=lengths[-1])
        return [dataclasses.asdict(c) | row for c, row in zip(some, answered, strict=True)]

    grid.fill(rows, cells, measure, loaders, batch=config.batch, desc=TASK)
    result = {
        "command": machine.command("duo_jax.evaluate"),
        **settings.describe(config, split),
        "task": "one needle",
        "repeated": haystack.text_tokens < lengths[-1],
        "text_tokens": haystack.text_tokens,
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
        "samples": config.samples,
        "sampled": "cell",
        "lengths": lengths,
        "depths": config.chosen_depths(),
        "rows": [rows[cell.key] for cell in cells],
    }
    heat_map.report(folder, TASK, result)


def _answer(
    config: NeedleConfig, model: DuoModel, texts: Sequence[Document], *, longest: int
) -> list[dict[str, Any]]:
    """Read texts and write on; return a row for each.

    The batch is filled up, so that a text gets the same answer whatever it is measured with.
    """
    full = [*texts, *texts[-1:] * (config.batch - len(texts))]
    new = config.max_new_tokens
    session = Session(model.runtime, batch_size=len(full), max_len=longest + new)
    session.append([text.tokens for text in full], room=new)
    assert session.cache is not None
    cache_bytes = live_bytes(session.cache) // len(full)
    written = [""] * len(full)
    for pieces in write_text(
        session,
        model.tokenization,
        max_new_tokens=new,
        continues=not config.chat,
    ):
        written = [text + piece for text, piece in zip(written, pieces, strict=True)]
    return [
        {
            "depth_exactly": text.depth,
            "answer": text.answer,
            "written": said,
            "exact": scores.exact_match(said, text.answer),
            "recall": scores.word_recall(said, text.answer),
            "cache_bytes": cache_bytes,
        }
        for text, said in zip(texts, written, strict=False)
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        NeedleConfig,
        prog="python -m duo_jax.evaluate needle",
        description=_DESCRIPTION,
        default=grid.default(NeedleConfig, TASK, args),
        args=args,
    )
