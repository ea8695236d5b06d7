"""Rows of evaluations and metrics of trainings: a damaged line costs itself, and nothing else."""

import json
import shutil
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from duo_jax.evaluate.results.rows import Rows
from duo_jax.schema import checksums, json_lines
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes, json_texts, sealed
from train.workdir import _check

_ROWS = [
    {"key": f"full length {length}", "row": {"length": length, "score": 0.5, "text": "ü\n"}}
    for length in (100, 200, 300)
]
_METRICS = [
    {"step": step, "loss": 0.25 / step, "mean_gate": 1, "gates_above_half": None}
    for step in (1, 2, 3)
]


def lines_of(records: list[dict[str, Any]]) -> list[bytes]:
    return [checksums.seal(record).encode() for record in records]


def damaged(records: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Files of lines with checksums, damaged in their bytes."""
    return damaged_bytes([b"".join(line + b"\n" for line in lines_of(records))])


@st.composite
def forged(draw: st.DrawFn, records: list[dict[str, Any]]) -> bytes:
    """Files with a line that is damaged by structure, without a checksum or with the right one."""
    texts = [json.dumps(record) for record in records]
    line = draw(st.one_of(json_texts(texts).map(str.encode), sealed(texts)))
    lines = lines_of(records)
    lines.insert(draw(st.integers(0, 3)), line)
    return b"\n".join([*lines, b""])


def check_lines(found: list[Any], content: bytes, known: list[Any], take: Callable) -> None:
    """Check that what was read is known, or is a line as Python reads it."""
    for record in found:
        if record not in known:
            assert any(take(line) == record for line in content.split(b"\n") if line.strip())


def parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return {key: value for key, value in values.items() if key != checksums.KEY}
    except (ValueError, AttributeError, RecursionError):
        return {}


def read_rows(folder, content: bytes) -> list[Any]:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "config.json").write_text('{"a": 1}')
    (work / "rows.jsonl").write_bytes(content)
    rows = attempt(lambda: Rows(work, {"a": 1}), size=len(content))
    assert rows is not REFUSED
    return [{"key": key, "row": rows[key]} for key in rows.keys()]  # noqa: SIM118


@fuzzed(damaged(_ROWS))
def test_damaged_rows_are_set_aside(content, folder):
    assert all(row in _ROWS for row in read_rows(folder, content))


@fuzzed(forged(_ROWS))
def test_rows_are_what_a_line_says(content, folder):
    found = read_rows(folder, content)
    assert len(found) >= 3
    check_lines(found, content, _ROWS, parsed)


def read_metrics(folder, content: bytes) -> list[Any]:
    file = folder / "metrics.jsonl"
    file.with_suffix(".damaged.jsonl").unlink(missing_ok=True)
    file.write_bytes(content)
    found = attempt(lambda: json_lines.read(file, _check, lost=""), size=len(content))
    assert found is not REFUSED
    return found


@fuzzed(damaged(_METRICS))
def test_damaged_metrics_are_set_aside(content, folder):
    assert all(record in _METRICS for record in read_metrics(folder, content))


@fuzzed(forged(_METRICS))
def test_metrics_are_the_numbers_of_a_line(content, folder):
    found = read_metrics(folder, content)
    assert all(type(record["step"]) is int and record["step"] > 0 for record in found)
    numbers = [value for record in found for value in record.values() if value is not None]
    assert all(type(number) in (int, float) and abs(number) < 1e39 for number in numbers)
    check_lines(found, content, _METRICS, parsed)
