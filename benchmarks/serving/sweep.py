"""The course of both serving benchmarks: every model, its rows, then JSON, table and picture."""

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.serving import random_model
from benchmarks.serving.flags import ServingFlags
from benchmarks.serving.report import Report
from benchmarks.serving.rivals import Rival, running
from duo_jax import files
from duo_jax.model.config import ModelConfig
from duo_jax.reports import machine

Rows = Callable[[str, ModelConfig, pathlib.Path, list[Rival]], Iterator[dict[str, Any]]]


def measure(
    flags: ServingFlags, rows_of: Rows, *, module: str, extra: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Measure every geometry, ours and the rivals on the same saved weights.

    Args:
      flags: the benchmark's flags.
      rows_of: yields the rows of one model; a row with "skipped" is a line about what was not
        measured.
      module: what `python -m` was given.
      extra: more entries of the result, measured after the rows.
    """
    began, environment = time.monotonic(), machine.environment()
    rows, skipped, versions = [], [], {}
    for geometry in flags.geometries:
        model = flags.model(geometry)
        folder = random_model.ensure_folder(model, flags.models, dtype=flags.dtype)
        with running(
            flags.rivals, folder, dtype=flags.dtype, kvpress_python=flags.kvpress_python
        ) as (libraries, lines):
            skipped += [line for line in lines if line not in skipped]
            versions |= {rival.library: rival.versions for rival in libraries}
            for row in rows_of(geometry, model, folder, libraries):
                if "skipped" in row:
                    skipped.append(row["skipped"])
                else:
                    rows.append(row)
    return {
        "command": machine.command(module),
        "settings": machine.to_json(flags),
        **environment,
        **{name: measured() for name, measured in extra.items()},
        "rival_versions": versions,
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "skipped": skipped,
        "rows": rows,
    }


def publish(result: dict[str, Any], out: pathlib.Path, report: Report) -> None:
    """Write .json, .md and .png, and print the table."""
    files.write_text(out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    report.plot(result, out.with_suffix(".png"))
    table = report.to_markdown(result)
    files.write_text(out.with_suffix(".md"), table + "\n")
    print(table)
