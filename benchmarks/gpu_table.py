"""README's table of speed-ups on a GPU, from the committed run of benchmarks.gpu_report.

    python -m benchmarks.gpu_table

Full caches against split ones, the same weights, in one run. Floors are counted from the shapes:
bytes of a decode step, operations of a prompt.
"""

import dataclasses
import pathlib
from typing import Any

from benchmarks import command
from benchmarks.gpu.decode import Decoding
from benchmarks.gpu.models import DECODE, Headline, Published
from benchmarks.gpu.prefill import Prefill
from benchmarks.gpu.program import Program
from benchmarks.gpu.settings import Settings, real
from benchmarks.serving.variants import Variant
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.reports import markdown
from duo_jax.schema.json_reader import read_json

_NOTHING = "not measured yet"
_NEEDED = {
    *("smoke", "rows", "does_not_fit", "models"),
    *("hardware", "jax", "dtype", "prefill_mode"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFlags:
    """Flags of the command."""

    result: pathlib.Path = pathlib.Path("benchmarks/results/gpu/serving.json")
    """The file of the report's stage `serving`; without it the table says that nothing is
    measured."""


def main(flags: TableFlags) -> None:
    """Print the table."""
    print(to_markdown(read(flags.result)))


def read(file: pathlib.Path) -> dict[str, Any] | None:
    """Return what the stage wrote; None if there was no run.

    Raises:
      InputError: the file cannot be read, or holds a smoke run, whose numbers mean nothing.
    """
    if not files.exists(file):
        return None
    result = read_json(file)
    missing = _NEEDED - result.keys()
    if missing:
        raise InputError(
            f"{file} is not a result of benchmarks.gpu_report: there is no "
            f"{', no '.join(sorted(missing))}"
        )
    if result["smoke"]:
        raise InputError(f"{file} holds a smoke run")
    return result


def to_markdown(result: dict[str, Any] | None) -> str:
    """Return the table, and what it was measured on."""
    settings, known = real(), result or {"rows": [], "does_not_fit": []}
    table = markdown.table(
        ("", "byte or FLOP floor", "published, A100", "duo_jax"),
        [
            _row(settings, published, headline, known)
            for headlines in zip(*(model.headlines for model in settings.models), strict=True)
            for published, headline in zip(settings.models, headlines, strict=True)
        ],
    )
    if result is None:
        return table
    sizes = "; ".join(
        f"{x['name']}: sink {x['sink']}, recent {x['recent']}, chunks of {x['chunk']:,}"
        for x in result["models"]
    )
    return (
        f"{table}\n\n{result['hardware']}, jax {result['jax']}, {result['dtype']}, prefill mode "
        f"{result['prefill_mode']}; {sizes}."
    )


def _row(
    settings: Settings, published: Published, headline: Headline, result: dict[str, Any]
) -> list[str]:
    duo, full = published.variants
    of_duo, of_full = (_program(settings, published, variant, headline) for variant in (duo, full))
    row = headline.row(result["rows"])
    too_large = any(line.startswith(f"{of_full.name}:") for line in result["does_not_fit"])
    return [
        f"{headline.what} speed-up, {published.name}, {duo.retrieval:.0%} retrieval heads, "
        f"{headline.tokens // 1000}K tokens",
        f"{of_full.floor() / of_duo.floor():.2f}",
        f"{headline.published:.2f}",
        f"**{row['speedup']:.2f}**" if row else "full does not fit" if too_large else _NOTHING,
    ]


def _program(
    settings: Settings, published: Published, variant: Variant, headline: Headline
) -> Program:
    of = {"settings": settings, "published": published, "variant": variant}
    if headline.what == DECODE:
        return Decoding(**of, contexts=(headline.tokens,))
    return Prefill(**of)


if __name__ == "__main__":
    command.run(main, TableFlags)
