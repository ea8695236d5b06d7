"""Saved caches: they go on bit for bit, refuse what they do not belong to, and appear whole."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from duo_jax.errors import InputError
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.config import parse_config
from duo_jax.session import cache_files
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.params import random_params

pytestmark = pytest.mark.core
# One layer of retrieval heads only, one of streaming heads only, one mixed.
RAW = models.llama(num_key_value_heads=4, num_hidden_layers=3)
CONFIG = parse_config(RAW)
HEADS = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
PROMPTS = [models.tokens(RAW, batch=1, length=n, seed=n)[0].tolist() for n in (30, 5)]


@functools.cache
def params(seed: int, dtype: str, heads: bytes):
    heads = np.frombuffer(heads, bool).reshape(HEADS.shape)
    return split_params(CONFIG, random_params(CONFIG, seed=seed, dtype=dtype), heads)


def runtime(*, heads=HEADS, sink=4, recent=8, seed=0, dtype="float32", **settings) -> Runtime:
    return Runtime(
        config=duo_config(CONFIG, heads, sink_size=sink, recent_size=recent),
        params=params(seed, dtype, heads.tobytes()),
        **({"prefill_chunk": 16} | settings),
    )


def write(session: Session, count: int = 10) -> list[list[int]]:
    rows = [[] for _ in session.tokens]
    for new in session.decode(max_new_tokens=count):
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
    return rows


def assert_equal(session: Session, other: Session) -> None:
    """Compare tokens, lengths, filled slots and logits bit for bit."""
    assert session.tokens == other.tokens
    lengths = np.asarray(session.cache.lengths)
    assert lengths.tolist() == np.asarray(other.cache.lengths).tolist()
    pairs = zip(*(jax.tree.leaves(s.cache.layers) for s in (session, other)), strict=True)
    for mine, theirs in jax.device_get(list(pairs)):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(mine[row, :, :length], theirs[row, :, :length])
    with session.borrowed() as mine, other.borrowed() as theirs:
        assert np.array_equal(mine.logits, theirs.logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A cache of one row that has been read and written on."""
    folder = tmp_path_factory.mktemp("cache") / "saved"
    session = Session(runtime())
    session.append(PROMPTS[:1])
    cache_files.save(session, folder, extra={"note": "é"})
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("written", [0, 10], ids=["read", "read and written"])
def test_a_loaded_cache_goes_on_bit_for_bit(tmp_path, dtype, written):
    model = runtime(dtype=dtype)
    session = Session(model, batch_size=2)
    session.append(PROMPTS)
    if written:  # the last token of each row is not in the cache then
        write(session, written)
    cache_files.save(session, tmp_path / "saved", extra={"a": [1]})
    loaded = Session(runtime(dtype=dtype), batch_size=2)
    assert cache_files.load(loaded, tmp_path / "saved") == {"a": [1]}
    read = loaded.timing.prefill_tokens
    assert_equal(loaded, session)
    assert loaded.timing.prefill_tokens - read == (2 if written else 0)
    more = [PROMPTS[1], PROMPTS[0]]
    for one in (session, loaded):
        one.append(more)
    assert write(session) == write(loaded)
    assert_equal(loaded, session)


def test_a_cache_loads_into_any_size_that_holds_it(saved):
    sessions = [Session(runtime(), max_len=size) for size in (None, 50)]
    for session in sessions:
        cache_files.load(session, saved)
    assert [session.capacity for session in sessions] == [128, 50]
    written = [write(session) for session in sessions]
    assert written[0] == written[1]
    with pytest.raises(InputError, match="30 tokens are too many: the cache was made for 20"):
        cache_files.load(Session(runtime(), max_len=20), saved)


def test_the_format_keeps_its_keys(saved):
    marker = json.loads((saved / "cache.json").read_text())
    assert (marker["format"], marker["version"]) == ("duo_jax cache", 2)
    assert marker.keys() == {
        "format", "version", "model", "dtype", "kv", "sink_size", "recent_size",
        "retrieval_heads", "prefill_mode", "weights", "lengths", "logits_at", "extra",
    }  # fmt: skip
    assert marker["model"]["max_length"] == 128
    assert marker["model"]["rope"]["original_max_length"] is None


def test_only_filled_slots_are_stored(saved):
    sizes = [file.stat().st_size for file in sorted(saved.glob("layer-*"))]
    keys = 4 * 8 * 4  # bytes of a token's keys in one layer
    assert len(sizes) == 3
    for size, slots in zip(sizes, (30, 12, (30 + 12) // 2), strict=True):
        assert 0 <= size - 2 * keys * slots < 500  # the header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another model or choice of retrieval heads .their values differ"),
        ({"heads": HEADS[:, [1, 0, 2, 3]]}, "another model or choice of retrieval heads"),
        ({"heads": HEADS[[2, 1, 0]]}, "another pattern or sparsity .*4, 0, 2.*2, 0, 4"),
        ({"heads": ~HEADS}, "another pattern or sparsity"),
        ({"sink": 3}, r"another sink size \(4, here 3\)"),
        ({"recent": 9}, r"another recent size \(8, here 9\)"),
        ({"dtype": "bfloat16"}, r"another dtype \(float32, here bfloat16\)"),
        ({"prefill_mode": "chunk"}, r"another prefill mode \(exact, here chunk\)"),
    ],
)
def test_what_a_cache_does_not_belong_to(saved, changes, message):
    session = Session(runtime(**changes))
    with pytest.raises(InputError, match=message) as error:
        cache_files.load(session, saved)
    assert "\n" not in str(error.value)
    assert session.tokens == [[]]


def test_another_architecture_is_refused(saved):
    model = runtime()
    longer = dataclasses.replace(CONFIG, max_positions=64)
    config = dataclasses.replace(model.config, architecture=longer)
    with pytest.raises(InputError, match="another model; read the text again"):
        cache_files.load(Session(dataclasses.replace(model, config=config)), saved)


def test_prefill_chunk_does_not_matter(saved):
    cache_files.load(Session(runtime(prefill_chunk=5)), saved)


def edit(folder: pathlib.Path, **changes) -> None:
    marker = json.loads((folder / "cache.json").read_text()) | changes
    marker = {key: value for key, value in marker.items() if value is not ...}
    (folder / "cache.json").write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "says 'duo_jax cache', version 1; this duo_jax reads"),
        ({"format": "other"}, "says 'other', version 2"),
        ({"version": ...}, "says 'duo_jax cache', version None; this duo_jax reads"),
        ({"weights": ...}, "lacks weights"),
        ({"extra": ..., "lengths": ...}, "lacks extra, lengths"),
        ({"sink_size": [4]}, "another sink size"),
        ({"dtype": {"a": 1}}, "another dtype"),
        ({"retrieval_heads": None}, "another pattern"),
        ({"model": 3}, "another model"),
        ({"lengths": 30}, "lengths is 30 in .*not a list of whole numbers"),
        ({"lengths": [30, 30]}, "holds 2 rows, not 1"),
        ({"lengths": ["30"]}, "not a list of whole numbers"),
        ({"lengths": [31]}, "is damaged"),
        ({"lengths": [0]}, "is damaged"),
        ({"lengths": [29.5]}, "not a list of whole numbers"),
        ({"lengths": [True]}, "not a list of whole numbers"),
        ({"lengths": [20]}, "is damaged"),
        ({"logits_at": "30"}, "not a list of whole numbers"),
        ({"logits_at": [30, 30]}, "is damaged"),
        ({"logits_at": [None]}, "not a list of whole numbers"),
        ({"logits_at": [31]}, "is damaged"),
        ({"extra": [1]}, "extra is no JSON object"),
    ],
    ids=str,
)
def test_damaged_markers(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(InputError, match=message) as error:
        cache_files.load(Session(runtime()), copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": "duo_jax cache"}', "\x00"])
def test_unreadable_markers(copy, text):
    (copy / "cache.json").write_text(text)
    with pytest.raises(
        InputError, match=r"cache\.json (is not JSON|holds no JSON object|says .*, version None)"
    ):
        cache_files.load(Session(runtime()), copy)


@pytest.mark.parametrize("name", ["tokens", "logits", "layer-00001"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut off", "garbage", "other tensors"])
def test_damaged_files(copy, name, harm):
    file = copy / f"{name}.safetensors"
    content = file.read_bytes()
    file.unlink()
    if harm == "other tensors":
        cache_files.save_file({"other": np.zeros(3)}, file)
    elif harm != "missing":
        new = {"empty": b"", "cut off": content[:-9], "garbage": b"\xff" * len(content)}[harm]
        file.write_bytes(new)
    session = Session(runtime())
    with pytest.raises(InputError, match="is damaged"):
        cache_files.load(session, copy)
    assert session.tokens == [[]]


def test_files_of_another_shape(copy):
    shutil.copy(copy / "layer-00000.safetensors", copy / "layer-00002.safetensors")
    with pytest.raises(InputError, match="is damaged"):
        cache_files.load(Session(runtime()), copy)


def test_tokens_outside_the_vocabulary(copy):
    cache_files.save_file({"0": np.array([97] * 30, np.int32)}, copy / "tokens.safetensors")
    with pytest.raises(InputError, match="token 97 is not one of the model's 96"):
        cache_files.load(Session(runtime()), copy)


def test_folders_that_hold_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"is no saved cache: there is no cache.json in it"):
            cache_files.load(Session(runtime()), folder)


def test_places_that_cannot_be_saved_to(saved, tmp_path):
    session = Session(runtime())
    with pytest.raises(InputError, match="nothing has been read yet"):
        cache_files.save(session, tmp_path / "new", extra={})
    cache_files.load(session, saved)
    with pytest.raises(InputError, match="already exists"):
        cache_files.save(session, saved, extra={})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        cache_files.save(session, tmp_path / "file", extra={})
    with pytest.raises(InputError, match="cannot be written"):
        cache_files.save(session, tmp_path / "file" / "below", extra={})
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_error_while_saving_leaves_nothing_behind(saved, tmp_path, monkeypatch, error):
    session = Session(runtime())
    cache_files.load(session, saved)
    real, calls = cache_files.save_file, []

    def fail(tensors, file):
        calls.append(file)
        if len(calls) == 3:
            raise error
        real(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(cache_files, "save_file", fail)
        with pytest.raises((error, InputError)):
            cache_files.save(session, tmp_path / "new", extra={})
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
    cache_files.save(session, tmp_path / "new", extra={})  # the session is none the worse
    again = Session(runtime())
    cache_files.load(again, tmp_path / "new")
    assert_equal(again, session)
