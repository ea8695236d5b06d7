"""Saved conversations: every changed byte is noticed, and a forged one does no harm."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest
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


def load(folder: pathlib.Path, changes: dict[str, bytes | None]) -> Session:
    """Load a cache of which some files are others, or missing (None); or return REFUSED."""
    contents = saved()[1] | changes
    for name, content in contents.items():  # new files: what is mapped must not change
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    session = Session(runtime())
    size = sum(len(content or b"") for content in contents.values())
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


def damages(name: str) -> st.SearchStrategy[bytes]:
    content = saved()[1][name]
    return json_files([content.decode()]) if name == _MARKER else damaged_bytes([content])


def damaged() -> st.SearchStrategy[dict[str, bytes | None]]:
    """Change one file, remove it, or put another in its place."""
    others = st.sampled_from([None, *saved()[1].values()])
    return st.one_of(
        *(st.fixed_dictionaries({name: damages(name)}) for name in _NAMES),
        st.fixed_dictionaries({}, optional=dict.fromkeys(_NAMES, others)),
    )


@pytest.mark.slow
@fuzzed(damaged)
def test_a_cache_of_which_a_byte_is_another_is_refused(changes, folder):
    session = load(folder, changes)
    same = all(content == saved()[1][name] for name, content in changes.items())
    assert (session is not REFUSED) == same
    if same:
        assert_same(session)


def forged() -> st.SearchStrategy[dict[str, bytes]]:
    """Change one file, and give it the right checksum."""

    def with_checksum(change: tuple[str, bytes]) -> dict[str, bytes]:
        name, content = change
        marker = json.loads(body())
        marker["files"][name] = checksums.of_bytes(content)
        return {_MARKER: checksums.seal(marker).encode() + b"\n", name: content}

    return st.one_of(
        sealed([body()]).map(lambda text: {_MARKER: text + b"\n"}),
        *(st.tuples(st.just(name), damages(name)).map(with_checksum) for name in _NAMES[1:]),
    )


@fuzzed(forged)
def test_a_forged_cache_is_refused_or_holds_finite_numbers(changes, folder):
    session = load(folder, changes)
    if session is not REFUSED:
        found = session.snapshot()
        places = zip(found.logits_at, found.tokens, strict=True)
        assert all(0 < at <= len(row) for at, row in places)
        leaves = jax.tree.leaves((found.logits, found.cache))
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
