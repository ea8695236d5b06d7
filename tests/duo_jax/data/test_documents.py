"""Where long text comes from: every kind of source, fixed order, clear errors."""

import json
import pathlib
import sys
import types

import pytest
import zstandard

from duo_jax.data import documents as text
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.errors import InputError

RECORDS = [
    {"text": "first"},
    {"content": "second", "text": 3},
    {"chapter": "third — ünlike"},
    {"document": "fourth"},
    {"article": "fifth", "id": 5},
]
TEXTS = ["first", "second", "third — ünlike", "fourth", "fifth"]


def json_lines(records=tuple(RECORDS)) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write(path: pathlib.Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_text_file(tmp_path):
    assert load_documents([write(tmp_path / "a.txt", "Zeile\nünlike")]) == ["Zeile\nünlike"]


def test_json_lines_under_every_key(tmp_path):
    assert load_documents([write(tmp_path / "a.jsonl", json_lines() + b"\n\n")]) == TEXTS


def test_zstandard_json_lines(tmp_path):
    packed = zstandard.ZstdCompressor().compress(json_lines())
    assert load_documents([write(tmp_path / "a.jsonl.zst", packed)]) == TEXTS


PRETTY = json.dumps(RECORDS, indent=2, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.JSONL", json_lines()),
        ("a.ndjson", json_lines()),
        ("a.NdJson", json_lines()),
        ("a.json", json_lines()),
        ("a.JSON", PRETTY),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", "\n\n" + json.dumps(RECORDS, ensure_ascii=False) + "\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + json_lines()),
        ("a.json", b"\xef\xbb\xbf" + PRETTY.encode()),
        ("joined.jsonl", b"".join(b"\xef\xbb\xbf" + json_lines([r]) for r in RECORDS)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_of_every_name_and_form(tmp_path, name, data, packed):
    data = data.encode() if isinstance(data, str) else data
    if packed:
        name, data = name + ".ZST", zstandard.ZstdCompressor().compress(data)
    assert load_documents([write(tmp_path / name, data)]) == TEXTS


@pytest.mark.parametrize("data", ['{"text": "one"}', '{\n "text": "one"\n}\n', '"one"'])
def test_one_text_of_a_json_file(tmp_path, data):
    assert load_documents([write(tmp_path / "a.json", data)]) == ["one"]


@pytest.mark.parametrize("name", ["A.TXT", "a.Md", "a.csv", "noname", "a.txt.zst"])
def test_anything_else_is_plain_text(tmp_path, name):
    data = json_lines()
    if name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    assert load_documents([write(tmp_path / name, data)]) == [json_lines().decode()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"words": 3}', r"a\.json, line 1: no text under any of text, content"),
        ('{\n"words": 3}', r"a\.json: no text under any of text, content"),
        ('[{"text": "a"}, {"words": 3}]', r"a\.json, entry 1: no text under any of"),
        ('[["a"]]', r"a\.json, entry 0: no text"),
        ('[{"text": "a"}', r"a\.json, entry 0 is not JSON, or the file is cut short"),
        ('["a", 1', r"a\.json, entry 1 is not JSON, or the file is cut short"),
        ('["a",]', r"a\.json, entry 1 is not JSON, or the file is cut short"),
        ('["a"] ["b"]', r"a\.json is not JSON: something follows its list"),
        ('["a", {"text": "b", "text": "c"}]', r"a\.json, entry 1 has the key 'text' twice"),
        ('["a", ' + "[" * 70 + "]" * 70 + "]", r"a\.json, entry 1 is nested more than 64 deep"),
        (f"[{'[' * 9999}", r"a\.json, entry 0 is nested more than 64 deep"),
        (" [\n ] ", r"no text found in .*a\.json$"),
        ('{"text": "a"}\n{"text": ', r"a\.json, line 2 is not JSON"),
        ("3", r"a\.json: no text"),
    ],
)
def test_a_json_file_without_texts_is_refused(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        load_documents([write(tmp_path / "a.json", data)])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "word" * 30}, r"a\.json has more than 100 characters; make it JSON lines"),
        (["a", "word" * 30], r"a\.json, entry 1 is not JSON, or has more than 100 characters"),
    ],
)
def test_json_that_is_too_large_is_refused(tmp_path, monkeypatch, value, message):
    monkeypatch.setattr("duo_jax.data.documents._LONGEST_LINE", 100)
    monkeypatch.setattr("duo_jax.data.documents._PIECE", 10)
    monkeypatch.setattr("duo_jax.schema.json_reader._STEP", 10)
    with pytest.raises(InputError, match=message):
        load_documents([write(tmp_path / "a.json", json.dumps(value))])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_a_json_list_is_read_in_pieces(tmp_path, monkeypatch, step, indent):
    monkeypatch.setattr("duo_jax.data.documents._PIECE", step)
    monkeypatch.setattr("duo_jax.schema.json_reader._STEP", step)
    texts = ["a", 'b]"},', "[\\", "\U0001f600" * 9, {"text": "c", "more": [1, {"d": 2.5}]}]
    data = json.dumps(texts, indent=indent, ensure_ascii=step % 2 > 0)
    assert load_documents([write(tmp_path / "a.json", data)]) == [*texts[:-1], "c"]


@pytest.mark.parametrize("limit", range(1, 12))
@pytest.mark.parametrize("suffix", ["txt", "txt.zst"])
def test_a_text_is_cut_between_characters(limit, suffix, tmp_path, monkeypatch):
    whole = "a\N{GRINNING FACE}\N{SNOWMAN}é\N{GRINNING FACE}\N{GRINNING FACE}b\N{SNOWMAN}"
    monkeypatch.setattr(text, "_MAX_CHARACTERS", limit)
    packed = zstandard.ZstdCompressor().compress(whole.encode())
    file = write(tmp_path / f"a.{suffix}", packed if suffix == "txt.zst" else whole)
    assert load_documents([file]) == [whole[:limit]]


@pytest.mark.parametrize("limit", [3, 4, 100])
def test_line_ends_are_one_character_wherever_a_text_is_cut(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_MAX_CHARACTERS", limit)
    (found,) = load_documents([write(tmp_path / "a.txt", b"ab\r\ncd\re\r\n")])
    assert "ab\ncd\ne\n".startswith(found)
    assert found.startswith("ab\n"[:limit])


def test_zstandard_with_several_frames_is_read_to_the_end(tmp_path):
    """As `zstd` leaves it after appending, and as parallel compressors write it."""
    compress = zstandard.ZstdCompressor().compress
    data = json_lines()
    packed = b"".join(compress(data[i : i + 20]) for i in range(0, len(data), 20))
    assert load_documents([write(tmp_path / "a.jsonl.zst", packed)]) == TEXTS


def test_zstandard_that_expands_as_no_text_does_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("duo_jax.data.packed_text._FREE", 1 << 20)
    packed = zstandard.ZstdCompressor().compress(json_lines([{"text": "word " * 400_000}]))
    with pytest.raises(InputError, match="unpacks to more than 1,000 times its size: no text"):
        load_documents([write(tmp_path / "a.jsonl.zst", packed)])


def test_zstandard_larger_than_any_buffer(tmp_path):
    documents = [f"{i} " + "word " * 50_000 for i in range(30)]
    packed = zstandard.ZstdCompressor().compress(json_lines([{"text": d} for d in documents]))
    assert load_documents([write(tmp_path / "a.jsonl.zst", packed)]) == documents


def test_folder_is_read_recursively_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.rst", "c.txt", "a/a.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "d.jsonl", '{"text": "d"}\n')
    write(tmp_path / "e.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "e"}\n'))
    write(tmp_path / "f.NDJSON", '{"text": "f"}\n')
    write(tmp_path / "g.TXT", "g")
    write(tmp_path / "ignored.py", "ignored")
    write(tmp_path / "ignored.json", "{}")
    (tmp_path / "folder.txt").mkdir()
    expected = ["a/a.txt", "a/b/c.rst", "a/z.md", "b.txt", "c.txt", "d", "e", "f", "g"]
    assert load_documents([str(tmp_path)]) == expected


def test_sources_are_read_in_the_order_given_and_blank_documents_left_out(tmp_path):
    sources = [write(tmp_path / name, name) for name in ("b.txt", "a.txt")]
    blank = write(tmp_path / "blank.txt", " \n")
    assert load_documents([sources[0], blank, sources[1]]) == ["b.txt", "a.txt"]


def test_built_in_text_is_the_language_reference():
    documents = load_documents([])
    assert documents == load_documents(())
    assert sum(map(len, documents)) > 300_000
    assert any("lambda" in document for document in documents)


def test_characters_are_capped_over_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_MAX_CHARACTERS", 10)
    monkeypatch.setattr(text, "_AT_LEAST", 1)
    sources = [write(tmp_path / f"{i}.txt", "abcd") for i in range(3)]
    late = write(tmp_path / "late.txt", b"\xff not even opened")
    assert load_documents([*sources, late]) == ["abcd", "abcd", "ab"]


def test_short_documents_count_for_what_they_cost_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_MAX_CHARACTERS", 10 * text._AT_LEAST)
    lines = ['{"text": "a"}', "", '{"text": " "}', "", *['{"text": "b"}'] * 20]
    source = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert load_documents([source]) == ["a", *["b"] * 6]


def characters(documents: list[str]) -> int:
    return sum(map(len, documents))


def test_held_out_text_is_a_tenth_of_the_characters():
    documents = load_documents(())
    training, held_out = split_held_out(documents)
    assert 0.1 <= characters(held_out) / characters(documents) < 0.11
    assert characters(training) + characters(held_out) == characters(documents)
    assert split_held_out(documents) == (training, held_out)
    # At most one document is cut, into two parts that start where a paragraph does.
    cut = [document for document in documents if document not in training + held_out]
    assert len(cut) <= 1
    for document in cut:
        (start,), (end,) = (
            [part for part in parts if part not in documents] for parts in (training, held_out)
        )
        assert start + end == document
        assert start.endswith("\n\n")


def test_every_tenth_document_is_held_out_first():
    """All that was held out when the demo model was trained."""
    documents = load_documents(())
    training, held_out = split_held_out(documents)
    assert set(documents[9::10]) <= set(held_out)
    assert not set(documents[9::10]) & set(training)


HELD_OUT = {
    "every tenth is a tenth": ([f"{i:02d}" for i in range(30)], ["09", "19", "29"]),
    "then every ninth": (["a" * 4] * 8 + ["b", "c"], ["aa", "b", "c"]),
    "the last of a few": (["a" * 100, "b" * 100, "c" * 10], ["b" * 11, "c" * 10]),
    "from a word on": (["a" * 90 + " " + "b" * 11], ["b" * 11]),
    "from a line on": (["word " * 100 + "\n" + "end " * 15], ["end " * 15]),
    "from a paragraph on": (["word " * 100 + "\n\n" + "end\n" * 15], ["end\n" * 15]),
    "no words": (["a" * 100], ["a" * 10]),
    "next to nothing": (["ab"], ["b"]),
}


@pytest.mark.parametrize(("documents", "held_out"), HELD_OUT.values(), ids=HELD_OUT.keys())
def test_what_is_held_out(documents, held_out):
    training, found = split_held_out(documents)
    assert found == held_out
    assert characters(training) + characters(found) == characters(documents)


PACKED = zstandard.ZstdCompressor().compress(json_lines() * 2000)
UNUSABLE = {
    "not UTF-8": ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
    "JSON lines not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8 text"),
    "packed lines not UTF-8": (
        "a.jsonl.zst",
        zstandard.ZstdCompressor().compress(b'{"text": "\xff"}\n'),
        "is not UTF-8 text",
    ),
    "broken JSON line": ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    "no text key": ("a.jsonl", '{"title": "a"}\n', "line 1: no text under any of text, content"),
    "text is a number": ("a.jsonl", '{"text": 1}\n', "line 1: no text under"),
    "line is a list": ("a.jsonl", '["a"]\n', "line 1: no text under"),
    "not zstd": ("a.jsonl.zst", json_lines(), "is not a zstd file"),
    "corrupt zstd": ("a.jsonl.zst", PACKED[:20] + b"\0" * 20 + PACKED[40:], "is not a zstd file"),
    "truncated zstd": ("a.jsonl.zst", PACKED[:-1], "is cut short"),
    "zstd cut to its header": ("a.jsonl.zst", PACKED[:6], "is cut short"),
    "empty file": ("a.txt", "", "no text found in"),
    "blank file": ("a.txt", " \n", "no text found in"),
    "empty zst": ("a.jsonl.zst", b"", "no text found in"),
}


@pytest.mark.parametrize(("name", "data", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_file_is_one_line_that_names_it(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(InputError) as error:
        load_documents([path])
    assert path in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.txt", "/no/such/file.txt", "./no/file", "no/such/x"])
def test_missing_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such text: {source} "):
        load_documents([source])


def test_folder_without_text(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.txt, \.md, \.rst, \.jsonl, \.ndjson"):
        load_documents([str(tmp_path)])


def test_data_set_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"org/books;.*pip install 'duo_jax\[datasets\]'"):
        load_documents(["org/books"])


def test_data_set_is_streamed_from_its_training_split(monkeypatch):
    def load_dataset(name, *, split, streaming):
        if name != "org/books":
            raise ConnectionError("no such\ndata set")
        assert (split, streaming) == ("train", True)
        return iter(RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_documents(["org/books"]) == TEXTS
    with pytest.raises(InputError, match="data set org/other cannot be read: no such"):
        load_documents(["org/other"])


def test_data_set_without_text_is_refused(monkeypatch):
    fake = types.SimpleNamespace(load_dataset=lambda *_, **__: iter([{"image": 1}]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(InputError, match="data set org/pictures: no text under any of"):
        load_documents(["org/pictures"])
