"""Weights in safetensors files, and the index of several, against the safetensors library."""

import json

import ml_dtypes
import numpy as np
import safetensors
from hypothesis import strategies as st
from safetensors.numpy import save

from duo_jax.checkpoints.safetensors_files import SafetensorsFiles
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import damaged_bytes, json_files, json_texts
from tests.fuzz.seeds import of_cases

_FILES = [
    save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}),
    save({"a": np.ones((2, 2), ml_dtypes.bfloat16), "b": np.arange(3), "c": np.float32(3.5)[None]}),
    save({"empty": np.ones((0, 4), np.float32)}, metadata={"format": "pt"}),
]
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# "both" is in both files: the index says which counts.
_SHARDS = {
    _FIRST: {"both": np.full(3, 1, np.float32), "first": np.ones(2, np.float32)},
    _SECOND: {"both": np.full(3, 2, np.float32), "second": np.ones(4, np.float32)},
}
_INDEX = {
    "metadata": {"total_size": 100},
    "weight_map": {"both": _FIRST, "first": _FIRST, "second": _SECOND},
}


def _parts(file: bytes) -> tuple[str, bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end].decode(), file[end:]


@st.composite
def _with_another_header(draw: st.DrawFn) -> bytes:
    header, data = _parts(draw(st.sampled_from(_FILES)))
    header = draw(json_texts([header])).encode()
    return len(header).to_bytes(8, "little") + header + data


@fuzzed(st.one_of(_with_another_header(), _with_another_header(), damaged_bytes(_FILES)))
def test_tensors_are_those_that_the_library_reads(content, folder):
    # A new file: writing into one that is mapped would change what is read of it.
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    found = attempt(lambda: SafetensorsFiles(folder), size=len(content))
    if found is REFUSED:
        return
    theirs = dict(safetensors.deserialize(content))
    assert found.info.keys() == theirs.keys()
    for name, info in found.info.items():
        assert (list(info.shape), info.dtype_name) == (theirs[name]["shape"], theirs[name]["dtype"])
        if info.dtype is not None:
            assert found.read(name).tobytes() == theirs[name]["data"]


@fuzzed(json_files([json.dumps(_INDEX), *of_cases("index-*/*.json")]))
def test_tensors_of_several_files_are_taken_from_where_the_index_says(content, folder):
    for name, tensors in _SHARDS.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(save(tensors))
    (folder / "model.safetensors.index.json").write_bytes(content)
    found = attempt(lambda: SafetensorsFiles(folder), size=len(content))
    if found is REFUSED:
        return
    weight_map = json.loads(content)["weight_map"]
    assert set(weight_map.values()) <= _SHARDS.keys()
    for name in found.info:
        shards = [file for file in set(weight_map.values()) if name in _SHARDS[file]]
        [file] = [weight_map[name]] if name in weight_map else shards
        assert np.array_equal(found.read(name), _SHARDS[file][name])
