"""Saved caches: they go on bit for bit, refuse what they do not belong to, and appear whole."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duo_jax.errors import InputError
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.schema import checksums
from duo_jax.session import cache_files, stored_arrays
from duo_jax.session.conversation import load_conversation
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from duo_jax.session.tokenization import Tokenization
from tests import models
from tests.disk import full_disk
from tests.params import random_params

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


@pytest.mark.parametrize("written", [0, 10], ids=["read", "read and written"])
def test_a_loaded_cache_goes_on_bit_for_bit(tmp_path, written):
    session = Session(runtime(), batch_size=2)
    session.append(PROMPTS)
    if written:  # the last token of each row is not in the cache then
        write(session, written)
    cache_files.save(session, tmp_path / "saved", extra={"a": [1]})
    loaded = Session(runtime(), batch_size=2)
    assert cache_files.load(loaded, tmp_path / "saved") == {"a": [1]}
    read = loaded.timing.prefill_tokens
    assert_equal(loaded, session)
    assert loaded.timing.prefill_tokens - read == (2 if written else 0)
    more = [PROMPTS[1], PROMPTS[0]]
    for one in (session, loaded):
        one.append(more)
    assert write(session) == write(loaded)
    assert_equal(loaded, session)


@pytest.mark.slow
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
    assert (marker["format"], marker["version"]) == ("duo_jax cache", 3)
    assert marker.keys() == {
        "format", "version", "model", "dtype", "kv", "sink_size", "recent_size",
        "retrieval_heads", "prefill_mode", "weights", "lengths", "logits_at", "extra", "files",
        "checksum",
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
        ({"kv_format": "int8"}, r"another KV format \(model, here int8\); read the text"),
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
    """Change what cache.json says, with the right checksum of all files."""
    marker, _ = checksums.read_sealed(folder / "cache.json")
    for file in folder.glob("*.safetensors"):
        marker["files"][file.name] = checksums.of_bytes(file.read_bytes())
    marker = {key: value for key, value in (marker | changes).items() if value is not ...}
    (folder / "cache.json").write_text(checksums.seal(marker) + "\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "says 'duo_jax cache', version 1; this duo_jax reads"),
        ({"version": 2}, "version 2; this duo_jax reads 'duo_jax cache', version 3: read the text"),
        ({"format": "other"}, "says 'other', version 3"),
        ({"version": ...}, "says 'duo_jax cache', version None; this duo_jax reads"),
        ({"weights": ...}, "missing required field `weights`"),
        ({"extra": ..., "lengths": ...}, "missing required field `lengths`"),
        ({"more": 1}, "unknown field `more`"),
        ({"sink_size": [4]}, "sink_size is .4.: expected a whole number"),
        ({"dtype": {"a": 1}}, "dtype is .*: expected a text"),
        ({"retrieval_heads": None}, "retrieval_heads is None: expected a list"),
        ({"model": 3}, "model is 3: expected an object"),
        ({"model": {}}, "another model"),
        ({"lengths": 30}, "lengths is 30: expected a list"),
        ({"lengths": [30, 30]}, "holds 2 rows, not 1"),
        ({"lengths": ["30"]}, "lengths.0. is '30': expected a whole number"),
        ({"lengths": [31]}, "do not fit the tokens"),
        ({"lengths": [0]}, "lengths.0. is 0: expected a whole number >= 1"),
        ({"lengths": [29.5]}, "expected a whole number"),
        ({"lengths": [True]}, "expected a whole number"),
        ({"lengths": [20]}, "do not fit the tokens"),  # fewer than logits_at
        ({"lengths": [20], "logits_at": [20]}, r"layer-00000.safetensors is damaged: full.keys is"),
        ({"logits_at": "30"}, "logits_at is '30': expected a list"),
        ({"logits_at": [30, 30]}, "do not fit the tokens"),
        ({"logits_at": [None]}, "expected a whole number"),
        ({"logits_at": [31]}, "do not fit the tokens"),
        ({"logits_at": [0]}, "logits_at.0. is 0: expected a whole number >= 1"),
        ({"extra": [1]}, "extra is .1.: expected an object"),
        ({"files": {}}, "cache.json has no checksum of tokens.safetensors"),
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
        save_file({"other": np.zeros(3)}, file)
        edit(copy)
    elif harm != "missing":
        new = {"empty": b"", "cut off": content[:-9], "garbage": b"\xff" * len(content)}[harm]
        file.write_bytes(new)
    session = Session(runtime())
    message = "cannot be read: No such file" if harm == "missing" else "is damaged"
    with pytest.raises(InputError, match=rf"/{name}\.safetensors {message}"):
        cache_files.load(session, copy)
    assert session.tokens == [[]]


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


FILES = ["cache.json", "tokens.safetensors", "logits.safetensors", "layer-00002.safetensors"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(copy, name):
    rng, content, model = random.Random(0), (copy / name).read_bytes(), runtime()
    for place in [0, 9, len(content) - 1, *rng.sample(range(len(content)), 12)]:
        (copy / name).write_bytes(flipped(content, place, rng.randrange(8)))
        session = Session(model)
        with pytest.raises(InputError, match=rf"^\S*/{name}\b") as error:
            cache_files.load(session, copy)
        assert "\n" not in str(error.value)
        assert session.tokens == [[]]
    (copy / name).write_bytes(content)
    cache_files.load(Session(model), copy)


def test_a_flipped_bit_anywhere_in_a_header_or_a_marker_is_noticed(copy):
    """Every byte of them, without all that loading does."""
    rng, file = random.Random(0), copy / "layer-00000.safetensors"
    expected = {
        f"full.{name}": ((1, 4, 30, 8), np.dtype(np.float32)) for name in ("keys", "values")
    }
    content, checksum = file.read_bytes(), checksums.of_bytes(file.read_bytes())
    stored_arrays.StoredArrays(file, expected).read(checksum)
    for place in range(200):
        file.write_bytes(flipped(content, place, rng.randrange(8)))
        with pytest.raises(InputError, match=rf"{file.name}\b"):
            stored_arrays.StoredArrays(file, expected).read(checksum)
    content = (copy / "cache.json").read_bytes()
    assert checksums.is_sealed(content[:-1])
    for place in range(len(content)):
        for bit in range(8):
            changed = flipped(content, place, bit)
            assert not (changed.endswith(b"\n") and checksums.is_sealed(changed[:-1]))


@pytest.mark.parametrize("place", [-1, -2, -3, -40])
def test_a_marker_cut_short(copy, place):
    content = (copy / "cache.json").read_bytes()
    (copy / "cache.json").write_bytes(content[:place])
    with pytest.raises(InputError, match=r"cache\.json is (not JSON|damaged)"):
        cache_files.load(Session(runtime()), copy)


def test_files_of_another_shape(copy):
    shutil.copy(copy / "layer-00000.safetensors", copy / "layer-00002.safetensors")
    edit(copy)
    with pytest.raises(InputError, match=r"layer-00002.safetensors is damaged: full.keys is"):
        cache_files.load(Session(runtime()), copy)


def test_what_a_header_claims_is_refused_before_memory_is_taken(copy, monkeypatch):
    """A sparse file of 64 GB, and one that is all header."""
    monkeypatch.setattr(stored_arrays.StoredArrays, "read", None)
    tokens = copy / "tokens.safetensors"
    shape = [1 << 34]
    for entry in ({"dtype": "I32", "shape": shape, "data_offsets": [0, 4 << 34]}, "x" * 10_000):
        header = json.dumps({"1": entry}).encode()
        with tokens.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + (4 << 34 if isinstance(entry, dict) else 0))
        with pytest.raises(InputError, match=r"is damaged: (0 is missing|a header of 10,0\d\d b)"):
            cache_files.load(Session(runtime()), copy)


@pytest.mark.parametrize(
    ("kv", "value"),
    [
        ("model", np.nan),
        # With codes, and numbers as in "model" beside them.
        pytest.param("int2", np.nan, marks=pytest.mark.slow),
        pytest.param("int4", -np.inf, marks=pytest.mark.slow),
    ],
)
def test_no_number_that_is_not_finite_is_loaded_or_saved(tmp_path, kv, value):
    model = runtime(kv_format=kv, dtype="bfloat16")
    session = Session(model)
    session.append(PROMPTS[:1])
    folder = tmp_path / "saved"
    cache_files.save(session, folder, extra={})
    numbers = 0
    # The third layer has the arrays of both others.
    for name in ("layer-00000", "layer-00001", "logits"):
        file = folder / f"{name}.safetensors"
        arrays, content = load_file(file), file.read_bytes()
        for name, array in arrays.items():
            if array.dtype == np.uint32:
                continue
            numbers += 1
            changed = array.copy()
            changed[(-1,) * array.ndim] = value
            save_file(arrays | {name: changed}, file)
            edit(folder)
            with pytest.raises(InputError, match=f"{file.name} .*: {name} holds NaN or infinity"):
                cache_files.load(Session(model), folder)
        file.write_bytes(content)
    assert numbers >= 5
    edit(folder)
    loaded = Session(model)
    cache_files.load(loaded, folder)
    assert_equal(loaded, session)  # bfloat16, too, to the bit
    [first, *others] = session.cache.layers
    broken = jax.tree.map(
        lambda leaf: leaf if leaf.dtype == np.uint32 else leaf.at[0, 0, 1, 0].set(value), first
    )
    with session.borrowed() as loan:
        loan.cache = dataclasses.replace(loan.take(), layers=(broken, *others))
    with pytest.raises(InputError, match="in the cache holds NaN or infinity, so it is not saved"):
        cache_files.save(session, tmp_path / "again", extra={})
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_is_what_numpy_says(dtype):
    bits = np.arange(1 << 16, dtype=np.uint32)
    values = (bits << 16).view(np.float32) if dtype == np.float32 else bits.astype(np.uint16)
    values = values.view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values)
    assert 0 < expected.sum() < values.size
    for place in range(0, values.size, 5):
        assert stored_arrays.all_finite(values[place : place + 1]) == expected[place]
    assert stored_arrays.all_finite(values[:0])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": 3}], "messages.*content is 3: expected a text"),
        ([{"role": "user"}], "missing required field `content`"),
        (["hi"], "expected an object"),
        ("hi", "expected a list"),
        ([{"role": None, "content": "hi"}], "role is None: expected a text"),
    ],
)
def test_messages_are_texts(copy, messages, message):
    edit(copy, extra={"messages": messages})
    with pytest.raises(InputError, match=message):
        load_conversation(copy, runtime(), Tokenization(tokenizer=None, stop_tokens=()))


def test_tokens_outside_the_vocabulary(copy):
    save_file({"0": np.array([97] * 30, np.int32)}, copy / "tokens.safetensors")
    edit(copy)
    with pytest.raises(InputError, match="token 97 is not one of the model's 96"):
        cache_files.load(Session(runtime()), copy)


def test_folders_that_hold_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"is no saved cache: there is no cache.json in it"):
            cache_files.load(Session(runtime()), folder)


def test_what_could_not_be_read_again_is_not_saved(saved, tmp_path, monkeypatch):
    session = Session(runtime())
    cache_files.load(session, saved)
    deep: dict = {}
    for _ in range(65):
        deep = {"x": deep}
    with pytest.raises(InputError, match="the chat is nested more than 64 deep"):
        cache_files.save(session, tmp_path / "new", extra=deep)
    monkeypatch.setattr(cache_files, "_MOST_KEPT", 1_000)
    with pytest.raises(InputError, match="the chat has 1,020 bytes as JSON; 1,000 can be saved"):
        cache_files.save(session, tmp_path / "new", extra={"x": "x" * 1_000})
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("size", [0, 100, 1_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(saved, tmp_path, size):
    session = Session(runtime())
    cache_files.load(session, saved)
    message = "new cannot be written: File too large$"
    with full_disk(size), pytest.raises(InputError, match=message):
        cache_files.save(session, tmp_path / "new", extra={})
    assert list(tmp_path.iterdir()) == []
    cache_files.save(session, tmp_path / "new", extra={})
    assert max(file.stat().st_size for file in (tmp_path / "new").iterdir()) > size


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_error_while_saving_leaves_nothing_behind(saved, tmp_path, monkeypatch, error):
    session = Session(runtime())
    cache_files.load(session, saved)
    real, calls = stored_arrays.save_file, []

    def fail(tensors, file):
        calls.append(file)
        if len(calls) == 3:
            raise error
        real(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(stored_arrays, "save_file", fail)
        with pytest.raises((error, InputError)):
            cache_files.save(session, tmp_path / "new", extra={})
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
    cache_files.save(session, tmp_path / "new", extra={})  # the session is none the worse
    again = Session(runtime())
    cache_files.load(again, tmp_path / "new")
    assert_equal(again, session)
