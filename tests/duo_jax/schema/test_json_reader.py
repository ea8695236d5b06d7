"""The one reader of JSON: what it refuses, in which words, and at which cost."""

import json
import time

import pytest

from duo_jax.errors import InputError
from duo_jax.files import read_text
from duo_jax.schema.json_reader import MAX_BYTES, parse_json, read_json

REFUSED = {
    "missing": (None, "cannot be read: No such file or directory"),
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8 text"),
    "empty": (b"", "is not JSON: Expecting value"),
    "cut": (b'{"a":\n ', "is not JSON: Expecting value: line 2 column 2"),
    "too deep": (b"[" * 100_000, "is nested more than 64 deep"),
    "too deep, and closed": (b'{"a":' * 300 + b"1" + b"}" * 300, "is nested more than 64 deep"),
    "a list": (b"[1]", "holds no JSON object"),
    "null": (b"null", "holds no JSON object"),
    "a key twice": (b'{"a": {"b": 1, "b": 1}}', "has the key 'b' twice in one object"),
    "NaN": (b'{"a": NaN}', "is not JSON: NaN is no number there"),
    "infinity": (b'{"a": -Infinity}', "is not JSON: -Infinity is no number there"),
    "beyond float64": (b'{"a": 1e999}', "holds a number beyond float64: '1e999'"),
    "5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", "holds a number of 5,000 digits: '777777"),
    "a million values": (
        b'{"a": [' + b"[]," * 600_000 + b"0]}",
        "holds more than 1,000,000 values and separators",
    ),
    "too large": (b" " * (MAX_BYTES + 1), f"has more than {MAX_BYTES:,} bytes"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_json_that_cannot_be_used_is_one_line_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_json_is_read_as_utf_8(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": ["ü", 1, null]}\n'.encode())
    assert read_json(tmp_path / "a.json") == {"a": ["ü", 1, None]}


def test_what_python_reads_of_plain_json_is_read_alike():
    values = {"a": [1, -2.5e-3, True, None, "ü\n"], "b": {"c": {}}, "d": 10**30, "": []}
    assert parse_json(json.dumps(values), "here") == values


def test_a_text_may_hold_any_number_of_commas_and_brackets():
    text = '[{"\\\\,' * 300_000
    assert parse_json(json.dumps([text]), "here") == [text]


def test_a_file_without_end_costs_no_more_than_the_bound():
    began = time.monotonic()
    with pytest.raises(InputError, match="/dev/zero cannot be read: it is a device"):
        read_json("/dev/zero")
    with pytest.raises(InputError, match="/dev/zero has more than 16,777,216 bytes"):
        read_text("/dev/zero", max_bytes=MAX_BYTES, pipes=True)
    assert time.monotonic() - began < 2
