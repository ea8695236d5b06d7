"""Result files of a pretrained model: what its steps have found, a file and a picture per part."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.real import tables
from benchmarks.real.steps import Step
from duo_jax import files
from duo_jax.evaluate.compare import plot as compare_plot
from duo_jax.evaluate.frontier import report as frontier_report
from duo_jax.evaluate.frontier import search
from duo_jax.evaluate.perplexity import report as perplexity_report
from duo_jax.evaluate.results import heat_map
from duo_jax.evaluate.results.result_json import to_json
from duo_jax.schema.json_reader import read_json

ABOUT = "about.json"
# Of what lm-evaluation-harness writes; its settings of tasks take pages.
_OF_HARNESS = ("command", "results", "n-samples", "duo_jax", "seed")

Found = dict[str, dict[str, Any]]  # by step: "row", what it is called in tables, and "result"


def collect(
    folder: pathlib.Path,
    steps: Sequence[tuple[Step, pathlib.Path]],
    *,
    model: str,
    places: Mapping[str, str],
    command: str,
) -> None:
    """Write a file and a picture for every part of which anything is finished.

    Args:
      folder: where they go.
      steps: with the folders that they run in.
      model: the name of the model.
      places: words to write instead of paths of this machine.
      command: how the whole was run.
    """
    files.make_folder(folder)
    parts: dict[str, Found] = {}
    missing: dict[str, list[str]] = {}
    for step, place in steps:
        if not files.present(step.result(place)):
            missing.setdefault(step.part, []).append(step.name)
            continue
        result = _without_places(read_json(step.result(place)), places) | {"model": model}
        if "rows" not in result:
            result = {name: result[name] for name in (*_OF_HARNESS, "model") if name in result}
        parts.setdefault(step.part, {})[step.name] = {"row": step.row, "result": result}
    for part, found in parts.items():
        files.write_text(folder / f"{part}.json", _to_json(found))
        picture = draw(part, found)
        if picture is not None:
            files.write_bytes(folder / f"{part}.png", picture)
    about = {
        "command": _replaced(command, places),
        "model": model,
        "parts": list(parts),
        "missing": missing,
    }
    files.write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def draw(part: str, found: Found) -> bytes | None:
    """Return the picture of a part, None if it has none."""
    if part == "needle":
        return heat_map.png(together(found))
    if part.startswith("passkeys"):
        return tables.png_by_length(found)
    if part == "compare":
        return compare_plot.png(found["compare"]["result"])
    if part == "frontier":
        result = found["frontier"]["result"]
        return frontier_report.png(result, search.stored(result)[0])
    if part in ("perplexity", "formats"):
        return perplexity_report.png(together(found))
    return None


def together(found: Found) -> dict[str, Any]:
    """Return one result with the rows of all steps of a part, named as their steps are."""
    entries = list(found.values())
    result = dict(entries[-1]["result"])  # a split one where there is one: it has sink and recent
    rows = [
        row | ({"caches": entry["row"]} if "caches" in row else {})
        for entry in entries
        for row in entry["result"]["rows"]
    ]
    lengths = {length for entry in entries for length in entry["result"].get("lengths", ())}
    return result | {
        "rows": rows,
        "labels": {entry["row"]: entry["row"] for entry in entries},
        "lengths": sorted(lengths),
    }


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Replace paths in all texts of a JSON value."""
    if isinstance(value, dict):
        return {name: _without_places(inner, places) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, places) for inner in value]
    return _replaced(value, places) if isinstance(value, str) else value


def _replaced(text: str, places: Mapping[str, str]) -> str:
    for place, word in places.items():
        text = text.replace(place, word)
    return text


def _to_json(found: Found) -> str:
    """Return a part as JSON, with one line for every row."""
    entries = []
    for name, entry in found.items():
        result = entry["result"]
        inner = to_json(result) if "rows" in result else json.dumps(result, indent=1) + "\n"
        entries.append(
            f'{json.dumps(name)}: {{"row": {json.dumps(entry["row"])}, "result": {inner}}}'
        )
    return "{\n" + ",\n".join(entries) + "\n}\n"
