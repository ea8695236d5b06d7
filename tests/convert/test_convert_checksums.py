"""Converted checkpoints notice every value that is not the one that was written."""

import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from convert.__main__ import main
from duo_jax.checkpoints import orbax_checkpoint
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError
from duo_jax.schema import checksums
from tests import models
from tests.processes import without_plugin_log


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("converted")
    models.write_hf(root / "hf", models.llama(num_hidden_layers=1))
    main([str(root / "hf"), str(root / "checkpoint")])
    return root / "checkpoint"


@pytest.fixture
def copy(converted, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(converted, tmp_path / "copy"))


def bits(folder: pathlib.Path) -> dict[str, bytes]:
    weights = open_weights(folder)
    return {tensor.name: np.asarray(weights.read(tensor)).tobytes() for tensor in weights.tensors}


def flip(file: pathlib.Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def largest(folder: pathlib.Path) -> pathlib.Path:
    files = (path for path in (folder / "params").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def seal(folder: pathlib.Path, **changes) -> None:
    marker, _ = checksums.read_sealed(folder / "duo_jax.json")
    (folder / "duo_jax.json").write_text(checksums.seal(marker | changes) + "\n")


def test_a_flipped_bit_among_the_values_is_refused(copy):
    """Nothing of theirs is checked by tensorstore; few of their compressed bits say nothing."""
    expected, file, rng, lines = bits(copy), largest(copy), random.Random(0), []
    size = file.stat().st_size
    for place in rng.sample(range(size // 8, size * 7 // 8), 6):
        bit = rng.randrange(8)
        flip(file, place, bit)
        try:
            assert bits(copy) == expected
        except InputError as error:
            lines.append(str(error))
        flip(file, place, bit)
    assert len(lines) >= 5
    assert all("/params is damaged" in line and "\n" not in line for line in lines)
    assert bits(copy) == expected


@pytest.mark.slow
def test_a_flipped_bit_in_any_other_file_is_refused_or_changes_nothing(copy):
    expected, rng, refused = bits(copy), random.Random(1), 0
    files = [path for path in (copy / "params").rglob("*") if path.is_file()]
    for file in sorted(path for path in files if path.stat().st_size):
        if file == largest(copy):
            continue
        place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, place, bit)
        try:
            assert bits(copy) == expected
        except InputError:
            refused += 1
        flip(file, place, bit)
    assert refused


def test_a_flipped_bit_anywhere_in_the_marker_is_refused(copy):
    """Also where a digit of the version turns into that of the other one."""
    file, rng = copy / "duo_jax.json", random.Random(0)
    version = file.read_bytes().index(b'"version": 1') + 11
    size = file.stat().st_size
    for place in [0, version, *range(size - 45, size), *rng.sample(range(size), 60)]:
        for bit in (0, 1) if place == version else (rng.randrange(8),):
            flip(file, place, bit)
            with pytest.raises(InputError, match=r"^\S*/duo_jax.json\b"):
                orbax_checkpoint._read_marker(file)
            flip(file, place, bit)


def test_every_array_has_its_own_digest(copy):
    marker = json.loads((copy / "duo_jax.json").read_text())
    digests = marker["digests"]
    assert len(set(digests.values())) == len(digests) > 10
    norm = {"norm/scale": digests["norm/scale"]}
    for changed in (digests | {"embed_tokens/embedding": norm["norm/scale"]}, norm):
        seal(copy, digests=changed)
        with pytest.raises(InputError, match=r"/params is damaged: \S+ is not what was written"):
            bits(copy)
    seal(copy, digests=digests, of_a_later_version=[1])
    assert bits(copy)


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ([], "digests is .*: expected an object"),
        ({"norm/scale": 1}, "expected a text"),
        (None, "digests is None: expected an object"),
    ],
)
def test_markers_are_checked_by_their_types(copy, digests, message):
    seal(copy, digests=digests)
    with pytest.raises(InputError, match=message):
        open_weights(copy)


def test_checkpoints_of_earlier_versions_are_read(copy):
    expected = bits(copy)
    marker = json.loads((copy / "duo_jax.json").read_text())
    (copy / "duo_jax.json").write_text(json.dumps(orbax_checkpoint.marker_of("model")))
    assert bits(copy) == expected
    del marker["checksum"]  # which no version wrote
    (copy / "duo_jax.json").write_text(json.dumps(marker))
    with pytest.raises(InputError, match=r"duo_jax.json is damaged: it lacks its checksum"):
        bits(copy)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_of_a_real_process(copy):
    file = largest(copy)
    flip(file, file.stat().st_size // 2, 0)
    command = [sys.executable, "-W", "error", "-m", "convert", "--to-hf", copy, copy / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    stderr = without_plugin_log(done.stderr)
    assert stderr.startswith(f"error: {copy}/params is damaged")
    assert stderr.count("\n") == 1
