"""The JSON reader, against Python's own."""

import json

from duo_jax.schema.json_reader import parse_json, read_json
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import json_files, json_texts

_SEEDS = [
    '{"a": [1, 2.5, -3e-7, true, null, "\\u00e4\\n"], "b": {"c": {"d": []}, "e": ""}}',
    "[[1, [2, [3]]], 1e3, {}]",
    '"text"',
    "12",
]


def same(ours, theirs) -> bool:
    """Whether two values are equal, types included."""
    return json.dumps(ours) == json.dumps(theirs)


@fuzzed(json_texts(_SEEDS))
def test_json_texts_are_read_as_python_reads_them_or_refused(text, folder):
    del folder
    value = attempt(lambda: parse_json(text, "f"), size=len(text))
    assert value is REFUSED or same(value, json.loads(text))


@fuzzed(json_files(_SEEDS))
def test_json_files_are_read_as_python_reads_them_or_refused(content, folder):
    file = folder / "a.json"
    file.write_bytes(content)
    value = attempt(lambda: read_json(file), size=len(content))
    assert value is REFUSED or same(value, json.loads(content.decode("utf-8")))
