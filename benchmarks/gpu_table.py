"""README's table of speed-ups on a GPU, from the committed run of benchmarks.gpu_report.

    python -m benchmarks.gpu_table

Full caches against split ones, the same weights, in one run. Floors are counted from the shapes:
bytes of a decode step, operations of a prompt.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.models import Published
from benchmarks.gpu.settings import Settings, real
from duo_jax import cli
from duo_jax.errors import InputError

_NOTHING = "not measured yet"
_NEEDED = {
    *("smoke", "rows", "does_not_fit", "models"),
    *("hardware", "jax", "dtype", "prefill_mode"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Flags of the command."""

    result: pathlib.Path = pathlib.Path("benchmarks/results/gpu/serving.json")
    """What the report's stage `serving` wrote; without it the table says that nothing is
    measured."""


def main(config: TableConfig) -> None:
    """Print the table."""
    print(to_markdown(read(config.result)))


def read(file: pathlib.Path) -> dict[str, Any] | None:
    """Return what the stage wrote; None if there was no run.

    Raises:
      InputError: the file cannot be read, or holds a smoke run, whose numbers mean nothing.
    """
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        missing = _NEEDED - result.keys()
        if missing:
            raise ValueError(f"there is no {', no '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a result of benchmarks.gpu_report: {error}") from None
    if result["smoke"]:
        raise InputError(f"{file} holds a smoke run")
    return result


def to_markdown(result: dict[str, Any] | None) -> str:
    """Return the table, and what it was measured on."""
    settings = real()
    lines = [
        "| | byte or FLOP floor | published, A100 | duo_jax |",
        "|---|---|---|---|",
        *(
            _row(what, settings, published, result or {"rows": [], "does_not_fit": []})
            for what in (decode.WHAT, prefill.WHAT)
            for published in settings.models
        ),
    ]
    if result is not None:
        sizes = "; ".join(
            f"{x['name']}: sink {x['sink']}, recent {x['recent']}, chunks of {x['chunk']:,}"
            for x in result["models"]
        )
        lines += [
            "",
            f"{result['hardware']}, jax {result['jax']}, {result['dtype']}, prefill mode "
            f"{result['prefill_mode']}; {sizes}.",
        ]
    return "\n".join(lines)


def _row(what: str, settings: Settings, published: Published, result: dict[str, Any]) -> str:
    duo, full = published.variants
    if what == decode.WHAT:
        tokens, speedup = published.contexts[0], published.decode_speedup
        of_full, of_duo = (
            decode.Decoding(
                settings=settings, published=published, variant=variant, contexts=(tokens,)
            )
            for variant in (full, duo)
        )
        floor = of_full.floor_bytes(tokens) / of_duo.floor_bytes(tokens)
    else:
        tokens, speedup = published.prompt, published.prefill_speedup
        of_full, of_duo = (
            prefill.Prefill(settings=settings, published=published, variant=variant)
            for variant in (full, duo)
        )
        floor = of_full.floor_flops() / of_duo.floor_flops()
    measured = next(_speedups(result["rows"], what, published.name, tokens), None)
    too_large = any(line.startswith(f"{of_full.name}:") for line in result["does_not_fit"])
    cells = [
        f"{what} speed-up, {published.name}, {duo.retrieval:.0%} retrieval heads, "
        f"{tokens // 1000}K tokens",
        f"{floor:.2f}",
        f"{speedup:.2f}",
        f"**{measured:.2f}**" if measured else "full does not fit" if too_large else _NOTHING,
    ]
    return f"| {' | '.join(cells)} |"


def _speedups(rows: list[dict[str, Any]], what: str, model: str, tokens: int) -> Iterator[float]:
    for row in rows:
        is_wanted = (row.get("what"), row.get("model")) == (what, model) and "speedup" in row
        if is_wanted and tokens in (row.get("context"), row.get("length")):
            yield row["speedup"]


if __name__ == "__main__":
    cli.run(
        main,
        TableConfig,
        prog="python -m benchmarks.gpu_table",
        description=__doc__.split("\n\n")[0],
    )
