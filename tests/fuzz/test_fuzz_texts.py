"""Texts: plain, as JSON lines, and packed."""

import io
import json
from typing import BinaryIO

import pytest
import zstandard
from hypothesis import strategies as st

from duo_jax.data.documents import load_documents
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import LONG, damaged_bytes, json_texts
from tests.fuzz.seeds import CASES

_RECORDS = [
    {"text": "first line\nsecond"},
    {"content": "ünlike", "text": 3},
    {"chapter": "third", "id": [1, 2]},
]
_LINES = [json.dumps(record, ensure_ascii=False) for record in _RECORDS]
_KEYS = ("text", "content", "chapter", "document", "article")
_PLAIN = ["Zeile\nünlike\r\n\r\nlast", "\ufeffwith a mark", " "]


def pack(content: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def documents_of(content: BinaryIO) -> list[str]:
    """Read JSON lines as Python does, up to the limit that `load_documents` documents."""
    found, left = [], 50_000_000
    for line in io.TextIOWrapper(content, encoding="utf-8-sig"):
        text = ""
        if line.strip():
            record = json.loads(line)
            text = next(record[key] for key in _KEYS if isinstance(record.get(key), str))
        if text.strip():
            found.append(text.encode("utf-8", "replace").decode())
        left -= max(len(text), 512)
        if left <= 0:
            break
    return found


@st.composite
def _json_lines(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(st.sampled_from(_LINES), max_size=3))
    lines.insert(draw(st.integers(0, len(lines))), draw(json_texts(_LINES)))
    return draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])).join(lines).encode()


_DAMAGED = st.one_of(_json_lines(), _json_lines(), damaged_bytes(["\n".join(_LINES).encode()]))


@fuzzed(damaged_bytes([text.encode() for text in _PLAIN]))
def test_a_text_is_what_python_reads(content, folder):
    file = folder / "a.txt"
    file.write_bytes(content)
    found = attempt(lambda: load_documents([str(file)]), size=len(content))
    if found is not REFUSED:
        assert found == [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()]


@fuzzed(_DAMAGED)
def test_json_lines_are_the_texts_that_python_reads(content, folder):
    file = folder / "a.jsonl"
    file.write_bytes(content)
    found = attempt(lambda: load_documents([str(file)]), size=len(content))
    assert found is REFUSED or found == documents_of(io.BytesIO(content))


_REPEATED = [b"\n", b"\0", b" ", b"x", b"[", b"0,", b"[],", b'"', b'\\"', b'{"text":""}\n']
_REPEATED += [line.encode() + b"\n" for line in ('{"text":"ab"}', *_LINES)]


@st.composite
def _packed(draw: st.DrawFn) -> bytes:
    """Frames that hold damaged lines, or many bytes of one kind."""
    many = st.sampled_from(_REPEATED).map(lambda one: one * (100 * LONG // len(one)))
    content = draw(many if draw(st.integers(0, 9)) == 0 else _json_lines())
    cut = draw(st.integers(0, len(content)))
    options = {"write_checksum": draw(st.booleans()), "write_content_size": draw(st.booleans())}
    return pack(content[:cut], **options) + pack(content[cut:], **options)


_FRAMES = [
    pack("\n".join(_LINES * 20).encode(), write_checksum=checked) for checked in (True, False)
]
_FRAMES.append((CASES / "text-177860" / "a.jsonl.zst").read_bytes())


@fuzzed(st.one_of(_packed(), damaged_bytes(_FRAMES)))
def test_packed_lines_are_the_texts_that_zstandard_unpacks(content, folder):
    file = folder / "a.jsonl.zst"
    file.write_bytes(content)
    found = attempt(lambda: load_documents([str(file)]), size=len(content))
    if found is not REFUSED:
        frames = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True)
        assert found == documents_of(frames)


_WIDE = "a" * 8_000 + "\N{GRINNING FACE}"  # one in a text, and all characters take four bytes
_FRAME = pack(b'{"text": "abc"}\n')
_COSTLY = {
    "a line.jsonl": lambda: json.dumps({"text": _WIDE * 2_090}, ensure_ascii=False).encode(),
    "packed line.jsonl.zst": lambda: pack(_COSTLY["a line.jsonl"]()),
    "too long.jsonl.zst": lambda: pack(b'{"text": "' + (_WIDE * 4_190).encode() + b'"}'),
    "text.txt": lambda: f" {_WIDE * 6_250}".encode(),
    "packed text.txt.zst": lambda: pack(f" {_WIDE * 6_250}".encode()),
    "empty frames.jsonl.zst": lambda: pack(b"") * 100_000 + _FRAME,
    "frames.jsonl.zst": lambda: _FRAME * 97_000,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", _COSTLY)
def test_a_text_costs_a_bounded_multiple_of_its_size(name, tmp_path):
    content = _COSTLY[name]()
    file = tmp_path / name
    file.write_bytes(content)
    size = len(content)
    del content
    found = attempt(lambda: load_documents([str(file)]), size=size)
    assert (found is REFUSED) == name.startswith("too long")
