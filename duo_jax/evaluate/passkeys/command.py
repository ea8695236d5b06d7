"""Command line: several passkeys in one text, read once, then asked for one after the other."""

import dataclasses
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import tyro

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkey_templates import PasskeyTemplates, in_words
from duo_jax.data.passkeys import (
    PasskeyConfig,
    PasskeySampler,
    Sample,
    sampler_of_first,
)
from duo_jax.evaluate.passkeys import retrieval
from duo_jax.evaluate.results import describe, grid, heat_map
from duo_jax.evaluate.results.forced import References
from duo_jax.evaluate.results.grid import GridFlags
from duo_jax.evaluate.results.rows import Rows
from duo_jax.reports import machine
from duo_jax.schema.kinds import Fraction, Many, Nats

TASK = "passkeys"
_DESCRIPTION = """\
Hide several passkeys in texts of every length, read each text once, then ask for all passkeys, one
after the other. This is the task that identification learns from, on other texts and through the
caches that serve the model. A passkey counts when greedy decoding would write all of it.

Without flags this measures the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (evaluate.json) where it has one, else the command's own.
"""
# Fields that do not change a row.
_OPERATIONAL = ("workdir", "full", "all_streaming", "batch")
_BINS = 10
_STREAM = 2  # of samples: identification trains on stream 0 and tests on stream 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeysConfig(GridFlags):
    """Flags of the command."""

    samples: Many = 8
    """Texts for each length."""
    data: Annotated[PasskeyTemplates, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PasskeyTemplates
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeyCell:
    """One text, measured with one kind of caches."""

    caches: str  # grid.FULL, grid.DUO or grid.STREAMING
    length: int
    sample: int

    @property
    def key(self) -> str:
        return f"{self.caches} length {self.length} sample {self.sample}"

    @property
    def text(self) -> tuple[int, int]:
        return self.length, self.sample


class _Row(TypedDict):
    """What is measured in a cell; lists have an item per passkey."""

    depths: list[Fraction]
    exact: list[Fraction]
    recall: list[Fraction]
    nll: NotRequired[list[Nats]]  # rows of earlier versions lack this and the next
    kl: NotRequired[list[Nats] | None]  # None: full caches were not measured, or it is they
    cache_bytes: int


def evaluate(flags: PasskeysConfig) -> None:
    """Measure what is missing; write JSON, a table and the heat map.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    folder = flags.folder(TASK)
    documents = load_documents(flags.text)
    split = flags.load()
    lengths = flags.chosen_lengths(shortest=1, longest=split.config.architecture.max_positions)
    samplers, haystacks = {}, {}
    for length in lengths:
        samplers[length], haystacks[length] = _sampler(flags, split, documents, length)
    identity = grid.identity(flags, split, documents)
    rows = Rows(folder, identity, operational=_OPERATIONAL, kind=_Row)
    loaders = grid.models(flags, split)
    cells = [
        PasskeyCell(caches=caches, length=length, sample=index)
        for caches in loaders
        for length in lengths
        for index in range(flags.samples)
    ]

    references = References()

    def measure(model: DuoModel, some: list[PasskeyCell]) -> list[dict[str, Any]]:
        drawn = [samplers[cell.length].sample(cell.sample, length=cell.length) for cell in some]
        return _measure(flags, model, some, drawn, references)

    grid.fill(rows, cells, measure, loaders, batch=flags.batch, desc=TASK)
    number = flags.data.num_passkeys
    made_of = in_words(flags.data.words, flags.data.passkey_words)
    result = {
        "command": machine.command("duo_jax.evaluate"),
        **describe.settings(flags, split),
        "task": f"{number} passkey{'s' * (number > 1)} of {made_of}",
        "seed": flags.seed,
        "samples": flags.samples,
        "sampled": "length",
        "lengths": lengths,
        "haystacks": [haystacks[length] for length in lengths],
        "depths": [(i + 0.5) / _BINS for i in range(_BINS)],
        "depth_label": "depth of the passkey (tenths)",
        "scores": {"exact": "exact retrieval", "recall": "tokens right"},
        "rows": [
            dataclasses.asdict(cell) | {"haystack": haystacks[cell.length]} | passkey
            for cell in cells
            for passkey in _by_depth(rows[cell.key])
        ],
    }
    heat_map.write(folder, TASK, result)


def _sampler(
    flags: PasskeysConfig, model: DuoModel, documents: list[str], length: int
) -> tuple[PasskeySampler, str]:
    """Return a sampler for one length, and the name of the text that it draws from.

    That is held-out text, or all text where the held-out part is too short for the length.
    """
    templates = dataclasses.asdict(flags.data)
    data = PasskeyConfig(**templates, min_length=1, max_length=length)
    _, held_out = split_held_out(documents)
    texts = {"held-out text": held_out, "all text": documents}
    return sampler_of_first(texts, data, model.tokenizer, seed=flags.seed, stream=_STREAM)


def _measure(
    flags: PasskeysConfig,
    model: DuoModel,
    cells: list[PasskeyCell],
    samples: list[Sample],
    references: References,
) -> list[dict[str, Any]]:
    """Read texts and ask for their passkeys; return a row for each.

    The batch is filled up, so that a text gets the same answers whatever it is measured with.
    """
    full = [*samples, *samples[-1:] * (flags.batch - len(samples))]
    forced, cache_bytes = retrieval.read(model.runtime, full)
    reference = references.for_cells(cells, forced)
    found = retrieval.judge(model.runtime, full, forced, reference=reference)
    return [
        {
            "depths": sample.depths,
            "exact": found.exact[i].tolist(),
            "recall": found.tokens[i].tolist(),
            "nll": found.nll[i].tolist(),
            "kl": None if found.kl is None else found.kl[i].tolist(),
            "cache_bytes": cache_bytes,
        }
        for i, sample in enumerate(samples)
    ]


def _by_depth(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per passkey, with the middle of the depth's tenth."""
    bins = np.minimum(np.array(row["depths"]) * _BINS, _BINS - 1).astype(int)
    measured = [name for name in ("exact", "recall", "nll", "kl") if row.get(name) is not None]
    return [
        {"depth": (number + 0.5) / _BINS}
        | {name: row[name][i] for name in measured}
        | {"cache_bytes": row["cache_bytes"]}
        for i, number in enumerate(bins.tolist())
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        PasskeysConfig,
        prog="python -m duo_jax.evaluate passkeys",
        description=_DESCRIPTION,
        default=lambda: grid.default(PasskeysConfig, TASK, args),
        args=args,
    )
