"""Saved conversations: every changed byte is noticed, and a forged one does no harm."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
from hypothesis import strategies as st

from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.schema import checksums
from duo_jax.session import cache_files
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes, json_files, sealed
from tests.params import random_params

_RAW = models.llama(num_hidden_layers=1)
_CONFIG = parse_config(_RAW)
_HEADS = np.array([[True, False]])
_MARKER = "cache.json"
_NAMES = [_MARKER, "tokens.safetensors", "logits.safetensors", "layer-00000.safetensors"]


@functools.cache
def runtime() -> Runtime:
    return Runtime(
        config=duo_config(_CONFIG, _HEADS, sink_size=4, recent_size=8),
        params=split_params(_CONFIG, random_params(_CONFIG), _HEADS),
        prefill_chunk=16,
    )


@functools.cache
def saved() -> tuple[Session, dict[str, bytes]]:
    """Return a session, and the files that it was saved in."""
    session = Session(runtime())
    session.append([models.tokens(_RAW, batch=1, length=30)[0].tolist()])
    with tempfile.TemporaryDirectory() as folder:
        cache_files.save(session, pathlib.Path(folder), extra={"messages": [{"role": "user"}]})
        return session, {name: (pathlib.Path(folder) / name).read_bytes() for name in _NAMES}


def load(folder: pathlib.Path, contents: dict[str, bytes]) -> Session:
    """Load a cache of these files, or return REFUSED."""
    for name in _NAMES:  # new files: what is mapped must not change
        (folder / name).unlink(missing_ok=True)
        if name in contents:
            (folder / name).write_bytes(contents[name])
    session = Session(runtime())
    size = sum(map(len, contents.values()))
    found = attempt(lambda: cache_files.load(session, folder), size=size)
    return REFUSED if found is REFUSED else session


def assert_same(session: Session) -> None:
    before = saved()[0].snapshot()
    after = session.snapshot()
    assert (after.tokens, after.logits_at) == (before.tokens, before.logits_at)
    jax.tree.map(np.testing.assert_array_equal, after.logits, before.logits)


def body() -> str:
    """Return cache.json without its checksum."""
    marker = json.loads(saved()[1][_MARKER])
    return json.dumps({key: value for key, value in marker.items() if key != checksums.KEY})


@functools.cache
def _damages(name: str) -> st.SearchStrategy[bytes]:
    content = saved()[1][name]
    return json_files([content.decode()]) if name == _MARKER else damaged_bytes([content])


@st.composite
def _damaged(draw: st.DrawFn) -> dict[str, bytes]:
    name = draw(st.sampled_from(_NAMES))
    action = draw(st.sampled_from(["damage"] * 20 + ["missing", "another"]))
    if action == "damage":
        return saved()[1] | {name: draw(_damages(name))}
    if action == "missing":
        return {other: content for other, content in saved()[1].items() if other != name}
    return saved()[1] | {name: saved()[1][draw(st.sampled_from(_NAMES))]}


@fuzzed(_damaged())
def test_a_cache_of_which_a_byte_is_another_is_refused(contents, folder):
    session = load(folder, contents)
    assert (session is not REFUSED) == (contents == saved()[1])


@functools.cache
def _forged_markers() -> st.SearchStrategy[bytes]:
    return sealed([body()]).map(lambda text: text + b"\n")


@st.composite
def _forged(draw: st.DrawFn) -> dict[str, bytes]:
    """Change a file, and give it the right checksum."""
    name = draw(st.sampled_from([_MARKER, *_NAMES]))
    if name == _MARKER:
        return saved()[1] | {_MARKER: draw(_forged_markers())}
    content = draw(_damages(name))
    marker = json.loads(body())
    marker["files"][name] = checksums.of_bytes(content)
    return saved()[1] | {_MARKER: checksums.seal(marker).encode() + b"\n", name: content}


@fuzzed(_forged())
def test_a_forged_cache_is_refused_or_holds_finite_numbers(contents, folder):
    session = load(folder, contents)
    if session is not REFUSED:
        found = session.snapshot()
        assert all(
            0 < at <= len(row) for at, row in zip(found.logits_at, found.tokens, strict=True)
        )
        leaves = jax.tree.leaves((found.logits, found.cache))
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
        if contents == saved()[1]:
            assert_same(session)
