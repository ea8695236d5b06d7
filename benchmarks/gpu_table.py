"""The tables of docs/gpu.md, from the committed runs of benchmarks.gpu_report.

    python -m benchmarks.gpu_table

The first: full caches against split ones, the same weights, in one run. Floors are counted from the
shapes: bytes of a decode step, operations of a prompt. The second: the kernels, beside other
libraries, before and after the first run was read.
"""

import dataclasses
import pathlib
from typing import Any

from benchmarks import command
from benchmarks.compile import roofline
from benchmarks.gpu.decode import Decoding
from benchmarks.gpu.models import DECODE, Headline, Published
from benchmarks.gpu.mosaic import RESULTS
from benchmarks.gpu.prefill import Prefill
from benchmarks.gpu.program import Program
from benchmarks.gpu.settings import Settings, real
from benchmarks.serving.variants import Variant
from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.reports import markdown
from duo_jax.schema.json_reader import read_json
from kernels.gpu import H200

_NOTHING = "not measured yet"
_NEEDED = {
    *("smoke", "rows", "does_not_fit", "models"),
    *("hardware", "jax", "dtype", "prefill_mode"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFlags:
    """Flags of the command."""

    result: pathlib.Path = RESULTS / "serving.json"
    """The file of the report's stage `serving`; without it the table says that nothing is
    measured."""
    kernels: pathlib.Path = RESULTS / "kernels.json"
    """The file of the stage `kernels`."""
    before: pathlib.Path = RESULTS / "before" / "kernels.json"
    """The same of an earlier run."""


def main(flags: TableFlags) -> None:
    """Print the tables."""
    print(to_markdown(read(flags.result)))
    if files.exists(flags.before) and files.exists(flags.kernels):
        print(f"\n{kernels_to_markdown(read_json(flags.before), read_json(flags.kernels))}")


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
        ("", "byte or FLOP floor", "published, A100", "duo_jax", "full, split"),
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
        _times(row),
    ]


def _times(row: dict[str, Any] | None) -> str:
    """Return the time with full caches and with split ones."""
    for key, unit in (("ms", "ms a token"), ("seconds", "s")):
        if row is not None and key in row:
            median = row[key]["median"]
            return f"{median * row['speedup']:.1f}, {median:.1f} {unit}"
    return ""


def kernels_to_markdown(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the table of kernels: milliseconds of an earlier run, and of a later one."""
    later = {row["name"]: row for row in after["rows"]}
    earlier = {row["name"]: row for row in before["rows"]}
    body = []
    for name in dict.fromkeys([*earlier, *later]):
        row, now = earlier.get(name, {}), later.get(name, {})
        rivals = row.get("rivals", {})
        timed = (
            row, now, row.get("mosaic", {}), rivals.get("jax.nn cudnn", {}),
            rivals.get("torch SDPA", {}),
        )  # fmt: skip
        body.append((name, *map(_ms, timed), _rate(now if "seconds" in now else row)))
    header = ("", "Triton", "Triton, mended", "Mosaic", "cuDNN", "PyTorch", "Triton reaches")
    return markdown.table(header, body)


def _ms(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds']['median']:.3g}" if "seconds" in row else ""


def _rate(row: dict[str, Any]) -> str:
    """Return what a kernel reaches of what bounds it on an H200."""
    if "seconds" not in row:
        return ""
    if roofline.floor(H200, row["flops"], row["bytes"])["bound"] == "compute":
        return f"{row['flops_per_second'] / 1e12:.0f} TFLOP/s"
    return f"{row['bytes_per_second'] / 1e9:,.0f} GB/s"


def _program(
    settings: Settings, published: Published, variant: Variant, headline: Headline
) -> Program:
    of = {"settings": settings, "published": published, "variant": variant}
    if headline.what == DECODE:
        return Decoding(**of, contexts=(headline.tokens,))
    return Prefill(**of)


if __name__ == "__main__":
    command.run(main, TableFlags)
