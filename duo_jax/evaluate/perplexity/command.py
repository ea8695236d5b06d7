"""Command line: how well long text is predicted, by position, with full and with smaller caches."""

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from duo_jax import cli
from duo_jax.api import DuoModel
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.errors import InputError
from duo_jax.evaluate.perplexity import reading, report
from duo_jax.evaluate.perplexity.settings import TASK, PerplexityConfig
from duo_jax.evaluate.perplexity.texts import stretches
from duo_jax.evaluate.results import describe, grid
from duo_jax.evaluate.results.rows import Rows
from duo_jax.reports import machine
from duo_jax.schema.kinds import Count, Nats, Size

_DESCRIPTION = """\
Read long texts through the caches that serve the model, and tell how well each token is predicted
from those before it, by their number: with full caches, with streaming heads, and with weights and
caches in fewer bits.

Without flags this measures the demo model that ships with duo_jax. Defaults shown are those of the
model named by --model: its own preset (evaluate.json) where it has one, else the command's own.
--sparsities takes the place of --sparsity and --threshold, which are refused; so is --keep, as
nothing is written.
"""
# Fields that decide which rows there are, not what is in them.
_ROW_CHOICE = ("workdir", "full", "sparsities", "weight_formats", "kv_formats")
# What `describe.settings` says that differs between settings.
_OF_A_SETTING = ("retrieval_heads", "sparsity", "weights", "kv")
_LONGEST = 8192
_FIRST_BUCKET = 256  # tokens; every later bucket is as long as all before it


class _Row(TypedDict):
    """A text, read in one setting; lists have an item per bucket of positions."""

    setting: str
    text: Size
    tokens: list[Count]
    nll: list[Nats]  # mean over the bucket's tokens
    cache_bytes: int


def evaluate(flags: PerplexityConfig) -> None:
    """Measure what is missing; write JSON, tables and the picture.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    documents = load_documents(flags.text)
    if not flags.text:
        documents = split_held_out(documents)[1]
    split = flags.load()
    length = _length(flags, split)
    texts = stretches(split.tokenizer, documents, length=length, samples=flags.samples)
    rows = Rows(flags.folder(), _identity(flags, split, documents), kind=_Row)
    bounds = bucket_bounds(length)
    result = {
        "command": machine.command("duo_jax.evaluate"),
        **{k: v for k, v in describe.settings(flags, split).items() if k not in _OF_A_SETTING},
        "text": list(flags.text) or "held-out text",
        "length": length,
        "samples": flags.samples,
        "bounds": bounds,
    }
    del split  # before others are loaded
    cells = [(setting, text) for setting in flags.settings() for text in range(flags.samples)]
    missing = [cell for cell in cells if _key(cell[0].name, cell[1]) not in rows]
    done = len(cells) - len(missing)
    with tqdm(total=len(cells), initial=done, desc=TASK, unit="text", disable=None) as bar:
        for setting in dict.fromkeys(setting for setting, _ in missing):
            model = flags.load_setting(setting)
            for text in [text for other, text in missing if other == setting]:
                nll, cache_bytes = reading.read(model.runtime, texts[text])
                row = {
                    "setting": setting.name,
                    "text": text,
                    "tokens": np.diff(bounds).tolist(),
                    # The token at place p is predicted from p others; nll begins at place 1.
                    "nll": [
                        float(np.mean(nll[start - 1 : stop - 1]))
                        for start, stop in itertools.pairwise(bounds)
                    ],
                    "cache_bytes": cache_bytes,
                }
                rows.add(_key(setting.name, text), row)
                bar.update()
            del model  # before the next one is loaded
    result["rows"] = [rows[_key(setting.name, text)] for setting, text in cells]
    report.write(flags.folder(), TASK, result)


def bucket_bounds(length: int) -> list[int]:
    """Return where buckets of places begin, and where the last one ends: 1, 256, 512, 1024, ..."""
    bounds, at = [1], _FIRST_BUCKET
    while at < length:
        bounds.append(at)
        at *= 2
    return [*bounds, length]


def _key(setting: str, text: int) -> str:
    return f"{setting}, text {text}"


def _length(flags: PerplexityConfig, model: DuoModel) -> int:
    longest = model.config.architecture.max_positions
    length = flags.length or min(longest, _LONGEST)
    if not 2 <= length <= longest:
        raise InputError(f"length {length:,} is not from 2 to the model's range of {longest:,}")
    return length


def _identity(flags: PerplexityConfig, model: DuoModel, documents: Sequence[str]) -> dict[str, Any]:
    """Return all that rows depend on."""
    found = grid.identity(flags, model, documents)
    pattern = grid.pattern_of(flags)
    gates = None if pattern is None else pattern.gates.tolist()
    return {k: v for k, v in found.items() if k not in _ROW_CHOICE} | {"gates": gates}


def main(args: list[str] | None = None) -> None:
    """Run the command on a list of words; default: the process's own."""
    cli.run(
        evaluate,
        PerplexityConfig,
        prog="python -m duo_jax.evaluate perplexity",
        description=_DESCRIPTION,
        default=lambda: grid.default(PerplexityConfig, TASK, args),
        args=args,
    )
