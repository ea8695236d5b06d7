"""The steps of measuring a pretrained model: commands of ours, each in a folder of its own."""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from duo_jax import files
from duo_jax.cache import KVFormat
from duo_jax.errors import InputError
from duo_jax.evaluate.perplexity.settings import Setting
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.heads.pattern import Pattern
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Few, Fraction

# As RULER's: text that says nothing, so that small models find what is hidden in it.
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_FILLER_LINES = 6_000  # of 25 tokens or so; a tenth of them is held out, longer than 8,192 tokens
# Long documents that come with every Python, and that no pattern of ours was found on.
_LONG_DOCUMENTS = ("_pydecimal.py", "tarfile.py", "argparse.py", "typing.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    lengths: tuple[Count, ...] = (1024, 2048, 4096, 8192)
    """Lengths of texts with needles, in tokens."""
    needle_depths: Few = 5
    """Depths of a needle, for each length."""
    sparsities: tuple[Fraction, ...] = (0.5, 0.75)
    """Fractions of streaming heads for needles, passkeys and RULER."""
    passkeys: tuple[Few, ...] = (4, 1)
    """Passkeys in a text."""
    samples: tuple[Few, ...] = (8, 6, 4, 2)
    """Texts with passkeys for each of the lengths."""
    compare_length: Count = 1024
    """Tokens of the texts of the comparison with other methods."""
    compare_samples: Few = 4
    """Texts of the comparison, for each of its two tasks."""
    budgets: tuple[Fraction, ...] = (0.5,)
    """Budgets of the comparison."""
    frontier_length: Count = 2048
    """Tokens of the texts for split, format and eviction together."""
    frontier_samples: Few = 4
    """Texts of it."""
    frontier_keeps: tuple[Fraction, ...] = (0.25,)
    """Fractions of tokens that retrieval heads keep, for it."""
    ruler_tasks: tuple[str, ...] = ("niah_single_1", "niah_multikey_2")
    """Tasks of RULER that need no download."""
    ruler_limits: tuple[Few, ...] = (10, 8, 4)
    """Questions of each task, for each of the lengths up to the third."""
    perplexity_length: Count = 4096
    """Tokens of the texts to predict with streaming heads."""
    perplexity_samples: Few = 3
    """Texts to predict."""
    perplexity_sparsities: tuple[Fraction, ...] = (0.5, 0.75, 0.25)
    """Fractions of streaming heads for perplexity."""
    formats_length: Count = 2048
    """Tokens of the texts to predict in smaller formats."""
    weight_formats: tuple[WeightFormat, ...] = ("int8", "int4")
    """Formats of weights, with full caches."""
    kv_formats: tuple[KVFormat, ...] = ("int8", "int4", "int2")
    """Formats of caches, with every head's cache full."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.samples) != len(self.lengths) or len(self.ruler_limits) > len(self.lengths):
            raise InputError("--samples needs a number for each length, --ruler-limits one at most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command."""

    part: str  # the result file that it belongs to
    name: str  # in that file
    row: str  # what its rows are called in tables
    words: tuple[str, ...]  # of `python -m duo_jax.evaluate`, without model, pattern and folders

    def command(self, model: str, folder: pathlib.Path) -> list[str]:
        """Return all words, of which the last ones say where results go."""
        words = [*self.words, "--model", model]
        if self.words[0] == "lm-eval":
            return [*words, "--answers", str(folder / "answers"), "--out", str(self.result(folder))]
        return [*words, "--workdir", str(folder)]

    def result(self, folder: pathlib.Path) -> pathlib.Path:
        """Return the file that the command writes at its end."""
        return folder / f"{self.words[0]}.json"

    def folder(self, work: pathlib.Path, model: str, pattern: Pattern) -> pathlib.Path:
        """Return the command's own folder in the work folder: of these words, model and pattern."""
        about: list[object] = [model, self.words]
        if NO_PATTERN not in self.words:
            about += [pattern.gates.tolist(), pattern.sink_size, pattern.recent_size]
        digest = hashlib.sha256(repr(about).encode()).hexdigest()
        return work / f"{self.name}-{digest[:8]}"


FULL = Setting(weights="model", kv="model").name


def streaming(sparsity: float) -> str:
    """Return the words for a fraction of streaming heads."""
    return Setting(weights="model", kv="model", sparsity=sparsity).name


def all_steps(sizes: Sizes, pattern: str, folder: pathlib.Path) -> list[Step]:
    """Return the steps in the order in which they are run: what says most per minute comes first.

    Args:
      sizes: how much is measured.
      pattern: the pattern's folder.
      folder: where texts are written.
    """
    return [
        *_perplexity(sizes, pattern),
        *_passkeys(sizes, pattern, filler(folder)),
        *_needle(sizes, pattern, filler(folder)),
        *_formats(sizes, filler(folder)),
        *_compare(sizes, pattern, filler(folder)),
        *_ruler(sizes, pattern),
        *_frontier(sizes, pattern, filler(folder)),
    ]


def filler(folder: pathlib.Path) -> pathlib.Path:
    """Return the file of text that says nothing."""
    return folder / "filler.txt"


def write_filler(folder: pathlib.Path) -> None:
    """Make the work folder and the text in it that says nothing.

    Raises:
      InputError: it cannot be written.
    """
    files.make_folder(folder)
    files.write_text(filler(folder), _FILLER * _FILLER_LINES)


def long_documents() -> list[str]:
    """Return the files whose text is predicted: long modules of Python's standard library."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return [str(library / name) for name in _LONG_DOCUMENTS]


def _heads(sparsities: Sequence[float], pattern: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what full caches and split heads are called, and their flags."""
    yield FULL, ("--pattern", NO_PATTERN)
    for sparsity in sparsities:
        flags = ("--pattern", pattern, "--sparsity", f"{sparsity:g}", "--no-full")
        yield streaming(sparsity), flags


def _perplexity(sizes: Sizes, pattern: str) -> Iterator[Step]:
    words = (
        *("perplexity", "--length", f"{sizes.perplexity_length}"),
        *("--samples", f"{sizes.perplexity_samples}", "--text", *long_documents()),
    )
    yield Step(
        part="perplexity",
        name="perplexity-full",
        row=FULL,
        words=(*words, "--pattern", NO_PATTERN, "--sparsities"),
    )
    for sparsity in sizes.perplexity_sparsities:
        flags = ("--pattern", pattern, "--no-full", "--sparsities", f"{sparsity:g}")
        yield Step(
            part="perplexity",
            name=f"perplexity-{sparsity:g}",
            row=streaming(sparsity),
            words=(*words, *flags),
        )


def _passkeys(sizes: Sizes, pattern: str, text: pathlib.Path) -> Iterator[Step]:
    for number in sizes.passkeys:
        for length, samples in zip(sizes.lengths, sizes.samples, strict=True):
            for row, flags in _heads(sizes.sparsities, pattern):
                yield Step(
                    part=f"passkeys-{number}",
                    name=f"passkeys-{number}-{length}-{_short(row)}",
                    row=row,
                    words=(
                        *_digits("passkeys", number),
                        *("--lengths", f"{length}", "--samples", f"{samples}"),
                        *("--text", str(text), *flags),
                    ),
                )


def _needle(sizes: Sizes, pattern: str, text: pathlib.Path) -> Iterator[Step]:
    for length in sizes.lengths:
        # The longest has to leave room for the answer in the model's range.
        tokens = length - _ANSWER if length == max(sizes.lengths) else length
        for row, flags in _heads(sizes.sparsities, pattern):
            yield Step(
                part="needle",
                name=f"needle-{length}-{_short(row)}",
                row=row,
                words=(
                    *("needle", "--words", "digits", "--max-new-tokens", f"{_ANSWER}"),
                    *("--lengths", f"{tokens}", "--num-depths", f"{sizes.needle_depths}"),
                    *("--text", str(text), *flags),
                ),
            )


_ANSWER = 8  # tokens written after a needle's question: five digits are at most six


def _formats(sizes: Sizes, text: pathlib.Path) -> Iterator[Step]:
    yield Step(
        part="formats",
        name="formats-perplexity",
        row=FULL,
        words=(
            *("perplexity", "--length", f"{sizes.formats_length}"),
            *("--samples", f"{sizes.perplexity_samples}", "--text", *long_documents()),
            *("--pattern", NO_PATTERN, "--sparsities"),
            *("--weight-formats", *sizes.weight_formats, "--kv-formats", *sizes.kv_formats),
        ),
    )
    length, samples = min(sizes.lengths), sizes.samples[0]
    settings = [Setting(weights="model", kv="model")]
    settings += [Setting(weights=form, kv="model") for form in sizes.weight_formats]
    settings += [Setting(weights="model", kv=form) for form in sizes.kv_formats]
    for setting in settings:
        yield Step(
            part="formats-passkeys",
            name=f"formats-passkeys-{setting.weights}-{setting.kv}",
            row=setting.name,
            words=(
                *_digits("passkeys", max(sizes.passkeys)),
                *("--lengths", f"{length}", "--samples", f"{samples}"),
                *("--text", str(text), "--pattern", NO_PATTERN),
                *("--weights", setting.weights, "--kv", setting.kv),
            ),
        )


def _compare(sizes: Sizes, pattern: str, text: pathlib.Path) -> Iterator[Step]:
    yield Step(
        part="compare",
        name="compare",
        row="",
        words=(
            *_at_once("compare", sizes, sizes.compare_length, sizes.compare_samples),
            *("--random-seeds", "1", *_fractions("--budgets", sizes.budgets)),
            *("--text", str(text), "--pattern", pattern),
        ),
    )


def _ruler(sizes: Sizes, pattern: str) -> Iterator[Step]:
    for task in sizes.ruler_tasks:
        for length, limit in zip(sizes.lengths, sizes.ruler_limits, strict=False):
            for row, flags in _heads(sizes.sparsities, pattern):
                yield Step(
                    part="ruler",
                    name=f"ruler-{task}-{length}-{_short(row)}",
                    row=row,
                    words=(
                        *("lm-eval", "--tasks", task),
                        *("--lengths", f"{length}", "--limit", f"{limit}"),
                        *(flag for flag in flags if flag != "--no-full"),
                    ),
                )


def _frontier(sizes: Sizes, pattern: str, text: pathlib.Path) -> Iterator[Step]:
    yield Step(
        part="frontier",
        name="frontier",
        row="",
        words=(
            *_at_once("frontier", sizes, sizes.frontier_length, sizes.frontier_samples),
            *_fractions("--sparsities", sizes.sparsities),
            *_fractions("--keeps", sizes.frontier_keeps),
            *("--text", str(text), "--pattern", pattern),
        ),
    )


def _at_once(evaluation: str, sizes: Sizes, length: int, samples: int) -> tuple[str, ...]:
    """Return the words of an evaluation that reads all texts, of one length, together."""
    digits = _digits(evaluation, max(sizes.passkeys))
    return (*digits, "--length", f"{length}", "--samples", f"{samples}", "--batch", f"{samples}")


def _digits(evaluation: str, number: int) -> tuple[str, ...]:
    return (evaluation, "--words", "digits", "--num-passkeys", f"{number}")


def _fractions(flag: str, values: Sequence[float]) -> tuple[str, ...]:
    return (flag, *(f"{value:g}" for value in values))


def _short(row: str) -> str:
    """Return the words for heads as a part of a file's name."""
    return "full" if row == FULL else row.split("%")[0]
