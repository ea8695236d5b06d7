"""How well choices of retrieval heads keep what a model finds: patterns, random heads, and none.

    python -m benchmarks.head_choices --model M --patterns learned=FOLDER profile=FOLDER

Pass keys hidden in held-out text, numbers that identification never drew, at every length, one key
in a text and several (train.retrieval_test: masks, each token after the true ones). All choices
answer the same texts, so that differences are paired, text by text: from full attention, and from
the pattern that is named "profile". Patterns of one name are seeds of one method. ± is two standard
errors over texts.

A row is written when it is measured: a killed run goes on, and more lengths, sparsities, seeds or
patterns add rows to a folder. Short lengths come first; results are written after each.
"""

import dataclasses
import hashlib
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from benchmarks import command
from benchmarks.quality import head_choices_report as report
from benchmarks.quality import named
from benchmarks.quality.head_choices_flags import HeadChoicesFlags, default
from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.cli import presets
from duo_jax.cli.pattern import find_pattern
from duo_jax.data.documents import load_documents, split_held_out, text_digest
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.pattern import (
    Pattern,
    check_fits,
    choose_retrieval_heads,
    load_pattern,
    random_heads,
)
from duo_jax.model.config import ModelConfig
from duo_jax.model.llama import Params
from duo_jax.reports import machine
from duo_jax.schema.kinds import Fraction, Nats, NotNegative
from duo_jax.session.runtime import digest_of
from train.identify.report import warning
from train.retrieval_test import RetrievalScores, RetrievalTest

Heads = Bool[np.ndarray, "layers kv_heads"]

_STREAM = 3  # of samples: identification has 0, its report 1, evaluations 2
# What more or other rows of a folder may have been asked for with.
_OPERATIONAL = (
    "workdir",
    "out",
    "patterns",
    "sparsities",
    "random_seeds",
    "lengths",
    "num_passkeys",
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Some retrieval heads; a line of the tables, or with other seeds of its name part of one."""

    name: str
    sparsity: float
    heads: Heads
    seed: int = 0


class _Row(TypedDict):
    """What is measured; scores have a list for each text, with an item per passkey."""

    haystack: str
    exact: list[list[Fraction]]
    tokens: list[list[Fraction]]
    nll: list[list[Nats]]
    kl: list[list[Nats]] | None  # None: full attention itself
    seconds: NotNegative


def main(flags: HeadChoicesFlags) -> None:
    """Measure what is missing, write and draw the results after every length; print the tables.

    Raises:
      InputError: anything in the configuration cannot be used.
    """
    folder = pretrained.resolve(flags.model)
    architecture = pretrained.load_config(folder)
    if max(flags.lengths) > architecture.max_positions:
        raise InputError(
            f"length {max(flags.lengths):,} is beyond the model's range of "
            f"{architecture.max_positions:,} tokens"
        )
    patterns = _patterns(flags, folder, architecture)
    first = next(iter(patterns.values()))[0]
    flags = dataclasses.replace(
        flags,
        sink=first.sink_size if flags.sink is None else flags.sink,
        recent=first.recent_size if flags.recent is None else flags.recent,
    )
    lab = _Lab(flags, folder, architecture)
    choices = list(_choices(flags, patterns))
    files.make_folder(flags.out.parent)
    cells = [(length, n) for length in sorted(flags.lengths) for n in sorted(flags.num_passkeys)]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cells) * len(choices), desc="head choices", disable=None) as bar:
        for length, passkeys in cells:
            rows += lab.measure(length, passkeys, choices, bar)
            result = _result(flags, architecture, choices, rows, lab.seconds)
            report.write(result, flags.out)
    print(report.to_markdown(result))
    print(f"written: {flags.out.with_suffix('')}.json, .md, .png")


def _patterns(
    flags: HeadChoicesFlags, folder: pathlib.Path, architecture: ModelConfig
) -> dict[str, list[Pattern]]:
    """Load the patterns, by name; of one name those of several seeds."""
    given = flags.patterns or [f"learned={find_pattern(folder, architecture)}"]
    patterns: dict[str, list[Pattern]] = {}
    for name, place in named.split(given):
        pattern = load_pattern(place)
        check_fits(
            pattern, num_layers=architecture.num_layers, num_kv_heads=architecture.num_kv_heads
        )
        patterns.setdefault(name, []).append(pattern)
    return patterns


def _choices(flags: HeadChoicesFlags, patterns: dict[str, list[Pattern]]) -> Iterator[Choice]:
    """Yield all choices, full attention first, as others are compared with it."""
    shape = next(iter(patterns.values()))[0].gates.shape
    yield Choice(name=report.FULL, sparsity=0.0, heads=np.ones(shape, bool))
    yield Choice(name=report.STREAMING, sparsity=1.0, heads=np.zeros(shape, bool))
    for sparsity in flags.sparsities:
        for name, seeds in patterns.items():
            for seed, pattern in enumerate(seeds):
                heads = choose_retrieval_heads(pattern.gates, sparsity=sparsity)
                yield Choice(name=name, sparsity=sparsity, heads=heads, seed=seed)
        as_many = choose_retrieval_heads(np.ones(shape), sparsity=sparsity)
        for seed in range(flags.random_seeds):
            heads = random_heads(as_many, seed=seed)
            yield Choice(name=report.RANDOM, sparsity=sparsity, heads=heads, seed=seed)


class _Lab:
    """A loaded model, and the rows that were measured on it."""

    def __init__(
        self, flags: HeadChoicesFlags, folder: pathlib.Path, architecture: ModelConfig
    ) -> None:
        self._flags, self._architecture = flags, architecture
        self._tokenizer = pretrained.load_tokenizer(folder)
        documents = load_documents(flags.text)
        self._training_text, self._held_out_text = split_held_out(documents)
        self._params: Params = pretrained.load_params(folder, dtype=jnp.dtype(flags.dtype))
        identity = dataclasses.asdict(flags) | {
            "weights_digest": digest_of(self._params),
            "text_digest": text_digest(documents),
        }
        self.seconds = 0.0  # that the rows took which were returned, in whatever run
        self._rows = Rows(flags.folder(), identity, operational=_OPERATIONAL, kind=_Row)

    def measure(
        self, length: int, passkeys: int, choices: list[Choice], bar: tqdm
    ) -> list[dict[str, Any]]:
        """Return a row for each choice, at one length with one number of passkeys.

        Choices of the same heads have one row. Full attention is computed once more where it is
        needed to compare with: its row stays as it is.
        """
        keys = [_key(length, passkeys, choice.heads) for choice in choices]
        complete = all(key in self._rows for key in keys)
        test = None if complete else self._test(length, passkeys)
        full: RetrievalScores | None = None
        results = []
        for key, choice in zip(keys, choices, strict=True):
            if test is not None and (key not in self._rows or full is None):
                began = time.monotonic()
                scores = self._scores(test, choice.heads, full)
                if full is None:
                    full = scores
                    self._warn(full, length, passkeys)
                if key not in self._rows:
                    self._rows.add(key, _row(test, scores, time.monotonic() - began))
            bar.update()
            results.append(_of_texts(self._rows[key], length, passkeys, choice))
        self.seconds += sum(self._rows[key]["seconds"] for key in dict.fromkeys(keys))
        return results

    def _test(self, length: int, passkeys: int) -> RetrievalTest:
        """Return texts that identification never saw."""
        return RetrievalTest(
            self._data(length, passkeys),
            self._tokenizer,
            self._training_text,
            self._held_out_text,
            num_samples=max(1, self._flags.tokens // length),
            seed=self._flags.seed,
            stream=_STREAM,
            implementation=self._flags.implementation,
        )

    def _data(self, length: int, passkeys: int) -> PasskeyConfig:
        data: dict[str, Any] = dataclasses.asdict(self._flags.data)
        data |= {"num_passkeys": passkeys, "min_length": 1, "max_length": length}
        return PasskeyConfig(**data)

    def _scores(
        self, test: RetrievalTest, heads: Heads, full: RetrievalScores | None
    ) -> RetrievalScores:
        sink, recent = self._flags.sink, self._flags.recent
        assert sink is not None
        assert recent is not None
        return test.scores(
            self._architecture,
            self._params,
            heads,
            sink_size=sink,
            recent_size=recent,
            reference=full,
        )

    def _warn(self, full: RetrievalScores, length: int, passkeys: int) -> None:
        words = warning(full, dataclasses.asdict(self._data(length, passkeys)))
        if words:
            print(f"warning: {words}", file=sys.stderr)


def _key(length: int, passkeys: int, heads: Heads) -> str:
    """Return a row's name, which holds the heads themselves: a pattern may change its name."""
    digest = hashlib.sha256(np.packbits(heads).tobytes()).hexdigest()[:16]
    return f"{length} tokens, {passkeys} pass keys, heads {digest}"


def _row(test: RetrievalTest, scores: RetrievalScores, seconds: float) -> dict[str, Any]:
    values = {name: getattr(scores, name) for name in report.MEASURES}
    return {
        "haystack": test.haystack,
        **{name: None if found is None else found.tolist() for name, found in values.items()},
        "seconds": round(seconds, 2),
    }


def _of_texts(row: dict[str, Any], length: int, passkeys: int, choice: Choice) -> dict[str, Any]:
    """Return a row of the result: each text's means over its passkeys."""
    return {
        "num_passkeys": passkeys,
        "length": length,
        "heads": choice.name,
        "sparsity": choice.sparsity,
        "seed": choice.seed,
        "retrieval_heads": int(choice.heads.sum()),
        **{
            name: None if row[name] is None else np.mean(row[name], axis=1).tolist()
            for name in report.MEASURES
        },
        "haystack": row["haystack"],
    }


def _result(
    flags: HeadChoicesFlags,
    architecture: ModelConfig,
    choices: list[Choice],
    rows: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "command": machine.command("benchmarks.head_choices"),
        "settings": machine.to_json(flags),
        **machine.environment(),
        "model": pathlib.PurePath(flags.model).name,
        "layers": architecture.num_layers,
        "kv_heads": architecture.num_kv_heads,
        "dtype": flags.dtype,
        "run_minutes": round(seconds / 60, 1),
        "choices": list(dict.fromkeys(choice.name for choice in choices)),
        "rows": rows,
    }


if __name__ == "__main__":
    command.run(
        main,
        HeadChoicesFlags,
        default=lambda: presets.defaults(None, HeadChoicesFlags.model, default),
        keep_programs=True,
    )
