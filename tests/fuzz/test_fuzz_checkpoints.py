"""Converted checkpoints: the marker, and the arrays, of which a changed byte gives no other number.

Arrays take tens of milliseconds each way, so fewer inputs reach them than other readers.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import strategies as st

from convert.__main__ import main as convert
from duo_jax.checkpoints.orbax_checkpoint import _read_marker, marker_of
from duo_jax.checkpoints.weights import open_weights
from duo_jax.schema import checksums
from tests import models
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes, json_files, sealed
from tests.training_state import State, state, workdir

# On a busy machine an answer of tensorstore comes after orbax has closed its event loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

_MARKERS = [marker_of(stored) for stored in ("model", "int8", "int4")]
_DIGESTS = {"norm/scale": "0" * 32, "embed_tokens/embedding": "1" * 32}
_BODIES = [json.dumps(marker | {"digests": _DIGESTS}) for marker in _MARKERS]
_FILES = [*map(json.dumps, _MARKERS), *(checksums.seal(json.loads(body)) for body in _BODIES)]


@fuzzed(st.one_of(json_files(_FILES), sealed(_BODIES).map(lambda text: text + b"\n")))
def test_a_marker_names_a_format_or_is_refused(content, folder):
    file = folder / "duo_jax.json"
    file.write_bytes(content)
    found = attempt(lambda: _read_marker(file), size=len(content))
    if found is not REFUSED:
        stored, digests = found
        raw = json.loads(content)
        assert {key: raw.get(key) for key in ("format", "version", "weights")} == {
            "weights": None
        } | marker_of(stored)
        assert digests == raw.get("digests")


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Return all files below a folder by their paths."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@functools.cache
def converted() -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    with tempfile.TemporaryDirectory() as root:
        source = models.write_hf(pathlib.Path(root) / "hf", models.llama(num_hidden_layers=1))
        convert([str(source), f"{root}/checkpoint"])
        return files_of(pathlib.Path(root) / "checkpoint")


@functools.cache
def trained() -> dict[str, bytes]:
    """Return the files of a work folder with two checkpoints."""
    with tempfile.TemporaryDirectory() as root:
        with contextlib.closing(workdir(pathlib.Path(root) / "work")) as work:
            for step in (1, 2):
                work.save(state(step))
        return files_of(pathlib.Path(root) / "work")


def damaged(files: dict[str, bytes], within: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
    """Names of files below `within`, and what is in their place; None: nothing."""
    return st.sampled_from([name for name in files if name.startswith(within)]).flatmap(
        lambda name: st.tuples(st.just(name), damaged_bytes([files[name]]) | st.none())
    )


def write(folder: pathlib.Path, files: dict[str, bytes | None]) -> pathlib.Path:
    """Write files into a folder that is new each time: what is mapped must not change."""
    made = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for name, content in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (made / name).write_bytes(content)
    return made


def arrays(folder: pathlib.Path) -> dict[str, bytes]:
    weights = open_weights(folder)
    return {tensor.name: np.asarray(weights.read(tensor)).tobytes() for tensor in weights.tensors}


@pytest.mark.slow
@fuzzed(lambda: damaged(converted(), "params/"), quick=3, thorough=500)
def test_arrays_of_a_damaged_checkpoint_are_the_right_ones_or_refused(change, folder):
    made = write(folder, converted() | dict([change]))
    found = attempt(lambda: arrays(made), size=len(change[1] or b""))
    shutil.rmtree(made)
    if found is not REFUSED:
        assert found == right_arrays()


@functools.cache
def right_arrays() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as root:
        return arrays(write(pathlib.Path(root), converted()))


@fuzzed(lambda: damaged(trained(), "checkpoints/2/"), quick=3, thorough=500)
def test_a_training_goes_on_from_a_checkpoint_as_it_was_written(change, folder):
    made = write(folder, trained() | dict([change]))

    def restore() -> State:
        with contextlib.closing(workdir(made)) as work:
            return work.restore(state(0))

    found = attempt(restore, size=len(change[1] or b""))
    assert found is not REFUSED
    assert int(found.step) in (1, 2)
    np.testing.assert_array_equal(found.gates, state(int(found.step)).gates)
    shutil.rmtree(made)
