"""Command line: a needle at every depth of texts of every length, drawn as a heat map."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import tyro

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.evaluate.needle.documents import Document, Haystack, NeedleTemplates
from duo_jax.evaluate.results import describe, grid, heat_map, scores
from duo_jax.evaluate.results.forced import References, force, score
from duo_jax.evaluate.results.grid import GridFlags
from duo_jax.evaluate.results.rows import Rows
from duo_jax.reports import machine
from duo_jax.schema.kinds import Count, Few, Fraction, Nats, Size
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

    depths: tuple[Fraction, ...] = ()
    """Depths of the needle, from 0 (beginning of the text) to 1 (end). Default: --num-depths evenly
    spaced ones."""
    num_depths: Few = 10
    """Number of evenly spaced depths, where --depths is not given."""
    max_new_tokens: Count = 50
    """Tokens to generate after the question, greedily."""
    chat: bool = False
    """Put text and question into one message of the model's chat template."""
    needle: Annotated[NeedleTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=NeedleTemplates
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.depths)) != len(self.depths):
            raise InputError("--depths names a depth twice")
        self.check_texts(per_length=len(self.depths) or self.num_depths)

    def chosen_depths(self) -> list[float]:
        """Return the depths, in ascending order."""
        return sorted(self.depths) or np.linspace(0, 1, self.num_depths).round(4).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """One text, measured with one kind of caches."""

    caches: str  # grid.FULL, grid.DUO or grid.STREAMING
    length: int
    depth: float
    sample: int

    @property
    def key(self) -> str:
        return f"{self.caches} length {self.length} depth {self.depth} sample {self.sample}"

    @property
    def text(self) -> tuple[int, float, int]:
        return self.length, self.depth, self.sample


class _Row(TypedDict):
    """A cell, and what is measured in it."""

    caches: str
    length: Count
    depth: Fraction
    sample: Size
    depth_exactly: Fraction
    answer: str
    written: str
    exact: Fraction
    recall: Fraction
    tokens: NotRequired[Fraction]  # rows of earlier versions lack this and the next two
    nll: NotRequired[Nats]
    kl: NotRequired[Nats | None]  # None: full caches were not measured, or it is they
    cache_bytes: int


def evaluate(flags: NeedleConfig) -> None:
    """Measure what is missing; write JSON, a table and the heat map.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    folder = flags.folder(TASK)
    documents = load_documents(flags.text)
    split = flags.load()
    haystack = Haystack(
        flags.needle, split.tokenization, documents, seed=flags.seed, chat=flags.chat
    )
    lengths = flags.chosen_lengths(
        shortest=haystack.shortest() + 1,
        longest=split.config.architecture.max_positions - flags.max_new_tokens,
    )
    identity = grid.identity(flags, split, documents)
    rows = Rows(folder, identity, operational=_OPERATIONAL, kind=_Row)
    loaders = grid.models(flags, split)
    cells = [
        NeedleCell(caches=caches, length=length, depth=depth, sample=sample)
        for caches in loaders
        for length in lengths
        for depth in flags.chosen_depths()
        for sample in range(flags.samples)
    ]

    references = References()

    def measure(model: DuoModel, some: list[NeedleCell]) -> list[dict[str, Any]]:
        texts = [
            haystack.document(length=cell.length, depth=cell.depth, sample=cell.sample)
            for cell in some
        ]
        answered = _answer(flags, model, some, texts, references, longest=lengths[-1])
        return [dataclasses.asdict(c) | row for c, row in zip(some, answered, strict=True)]

    grid.fill(rows, cells, measure, loaders, batch=flags.batch, desc=TASK)
    result = {
        "command": machine.command("duo_jax.evaluate"),
        **describe.settings(flags, split),
        "task": "one needle",
        "repeated": haystack.text_tokens < lengths[-1],
        "text_tokens": haystack.text_tokens,
        "seed": flags.seed,
        "max_new_tokens": flags.max_new_tokens,
        "samples": flags.samples,
        "sampled": "cell",
        "lengths": lengths,
        "depths": flags.chosen_depths(),
        "rows": [rows[cell.key] for cell in cells],
    }
    heat_map.write(folder, TASK, result)


def _answer(
    flags: NeedleConfig,
    model: DuoModel,
    cells: list[NeedleCell],
    texts: Sequence[Document],
    references: References,
    *,
    longest: int,
) -> list[dict[str, Any]]:
    """Score the true answers, then generate some; return a row for each text.

    The batch is filled up, so that a text gets the same answer whatever it is measured with.
    """
    full = [*texts, *[texts[-1]] * (flags.batch - len(texts))]
    new = flags.max_new_tokens
    session = Session(model.runtime, batch_size=len(full), max_len=longest + new)
    session.append([text.tokens for text in full], room=new)
    # A longer answer could not be written either.
    answers = [np.array(text.answer_tokens[:new], np.int32) for text in full]
    forced, cache_bytes = force(session, answers, room=new, go_on=True)
    reference = references.for_cells(cells, forced)
    known = score(model.runtime, forced, answers, reference=reference)
    written = [""] * len(full)
    for pieces in write_text(
        session,
        model.tokenization,
        max_new_tokens=new,
        continues=not flags.chat,
    ):
        written = [text + piece for text, piece in zip(written, pieces, strict=True)]
    return [
        {
            "depth_exactly": text.depth,
            "answer": text.answer,
            "written": written[i],
            "exact": scores.exact_match(written[i], text.answer),
            "recall": scores.word_recall(written[i], text.answer),
            "tokens": float(np.mean(known.predicted[i, : answers[i].size] == answers[i])),
            "nll": float(np.mean(known.nll[i, : answers[i].size])),
            "kl": None if known.kl is None else float(np.mean(known.kl[i, : answers[i].size])),
            "cache_bytes": cache_bytes,
        }
        for i, text in enumerate(texts)
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        NeedleConfig,
        prog="python -m duo_jax.evaluate needle",
        description=_DESCRIPTION,
        default=lambda: grid.default(NeedleConfig, TASK, args),
        args=args,
    )
