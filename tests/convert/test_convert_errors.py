"""Input that cannot be converted: one line, exit code 2, nothing left behind."""

import asyncio
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from orbax.checkpoint._src.serialization import type_handlers
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from tests import models
from tests.disk import full_disk
from tests.processes import without_plugin_log

both_ways = pytest.mark.parametrize("to_hf", [[], ["--to-hf"]], ids=["checkpoint", "hf"])


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return models.write_hf(tmp_path / "model", models.llama())


@pytest.fixture
def assert_refused(capfd, caplog):
    """Run the command; it must say one line on stderr, log nothing, and exit with 2."""

    def check(message: str, *args: object) -> None:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(arg) for arg in args])
        captured = capfd.readouterr()
        error = without_plugin_log(captured.err)
        assert exited.value.code == 2
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: "), error
        assert message in error
        assert captured.out == ""
        assert caplog.records == []  # outside pytest they would be printed

    return check


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut(folder: pathlib.Path) -> None:
    os.truncate(folder / "model.safetensors", 20_000)


def misfit(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((3, 5), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")


def lose_a_shard(folder: pathlib.Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


SOURCES = {
    "truncated": (cut, "model.safetensors is not a complete safetensors file"),
    "zero bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors is not a complete safetensors file",
    ),
    "missing shard": (lose_a_shard, "lacks model-00002-of-00002.safetensors, model.safetensors"),
    "tensors that do not fit": (
        misfit,
        "2 missing: model.layers.0.mlp.up_proj.weight, model.norm.weight; "
        "1 unknown: model.layers.2.mlp.up_proj.weight; "
        "1 of another shape: lm_head.weight is [3, 5] instead of [96, 32]\n",
    ),
    "unsupported family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        "model type 'gpt2' is not supported",
    ),
    "only pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "--allow-pickle",
    ),
    "no weights at all": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no weights",
    ),
}


@both_ways
@pytest.mark.parametrize(("change", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_a_source_that_cannot_be_used(folder, assert_refused, change, message, to_hf):
    change(folder)
    before = names(folder)
    assert_refused(message, folder, folder.parent / "new" / "out", *to_hf)
    assert names(folder.parent) == ["model"]
    assert names(folder) == before


@pytest.mark.parametrize("name", ["nothing", "org/nothing"])
def test_no_such_model(tmp_path, assert_refused, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_refused(name, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@both_ways
def test_an_existing_destination_is_left_alone(folder, assert_refused, to_hf):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "precious").write_text("kept")
    assert_refused("out already exists", folder, folder.parent / "out", *to_hf)
    assert names(folder.parent / "out") == ["precious"]
    assert names(folder.parent) == ["model", "out"]


def test_source_and_destination_the_same(folder, assert_refused):
    before = names(folder)
    assert_refused("already exists", folder, folder)
    assert names(folder) == before


def test_an_empty_destination_is_filled(folder):
    (folder.parent / "out").mkdir()
    main([str(folder), str(folder.parent / "out")])
    assert (folder.parent / "out" / "config.json").exists()


@both_ways
def test_an_unwritable_destination(folder, assert_refused, to_hf):
    (folder.parent / "file").write_text("")  # no permission can be taken from root
    assert_refused("cannot be written", folder, folder.parent / "file" / "out", *to_hf)
    assert_refused("is a file; an output folder", folder, folder.parent / "file", *to_hf)
    assert names(folder.parent) == ["file", "model"]


@both_ways
@pytest.mark.parametrize("size", [5_000, 20_000])
def test_a_disk_that_takes_no_more(folder, assert_refused, to_hf, size):
    with full_disk(size):
        assert_refused("out cannot be written", folder, folder.parent / "out", *to_hf)
    assert names(folder.parent) == ["model"]


def test_whatever_orbax_writes_has_ended_before_it_is_removed(folder, assert_refused, monkeypatch):
    """Orbax writes arrays side by side, and raises the error of the first that fails."""
    begun, ended = [], []

    async def write(*arguments):
        begun.append(arguments)
        if len(begun) == 1:
            raise OSError(errno.ENOSPC, "full")
        await asyncio.sleep(0.2)
        partial = folder.parent / ".out.partial" / "params"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / str(len(ended))).write_text("late")
        ended.append(arguments)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", write)
    assert_refused("out cannot be written", folder, folder.parent / "out")
    assert len(ended) == len(begun) - 1 > 10
    assert names(folder.parent) == ["model"]


@pytest.mark.slow
def test_threads_that_write_on_are_waited_for(folder, assert_refused, monkeypatch):
    """Tensorstore writes the chunks of an array so, after the first error too."""
    partial = folder.parent / ".out.partial" / "params"

    def write_on() -> None:
        for number in range(3):
            time.sleep(0.2)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / str(number)).write_text("late")

    thread = threading.Thread(target=write_on)

    async def write(*arguments):
        del arguments
        if thread.ident is None:
            thread.start()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(type_handlers.NumpyHandler, "_open_and_write", write)
    assert_refused("out cannot be written", folder, folder.parent / "out")
    thread.join()
    assert names(folder.parent) == ["model"]


@both_ways
def test_a_value_beyond_the_type_asked_for(folder, assert_refused, to_hf):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5  # one of the last tensors
    save_file(tensors, folder / "model.safetensors")
    message = "model.norm.weight has values beyond the range of float16"
    assert_refused(message, folder, folder.parent / "out", "--dtype", "float16", *to_hf)
    assert names(folder.parent) == ["model"]


def test_flags_that_make_no_sense(folder, assert_refused):
    out = folder.parent / "out"
    for size in ("0", "-1", "nan", "1e308"):
        flags = ("--to-hf", "--max-shard-gb", size)
        assert_refused("is not a number above 0, at most 1e+06", folder, out, *flags)


def lose(path: str):
    def change(folder: pathlib.Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def cut_data(folder: pathlib.Path) -> None:
    """Cut every data file of the orbax checkpoint in half."""
    data = [path for path in (folder / "params").rglob("d/*") if path.is_file()]
    assert data
    for path in data:
        os.truncate(path, path.stat().st_size // 2)


def scramble_data(folder: pathlib.Path) -> None:
    """Overwrite the first half of the largest data file, but not what describes it at its end."""
    files = [path for path in (folder / "params").rglob("d/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.write(b"\xff" * (path.stat().st_size // 2))


CHECKPOINTS = {
    "no orbax folder": (lose("params"), "params is damaged"),
    "no tree": (lose("params/state/_METADATA"), "params is damaged"),
    "no manifest": (lose("params/state/manifest.ocdbt"), "params is damaged"),
    "cut data": (cut_data, "params is damaged"),
    "scrambled data": (scramble_data, "params is damaged"),
    "another version": (
        lambda folder: (folder / "duo_jax.json").write_text(
            '{"format": "duo_jax checkpoint", "version": 2}'
        ),
        "version 2; this duo_jax reads 'duo_jax checkpoint', version 1",
    ),
    "broken marker": (
        lambda folder: (folder / "duo_jax.json").write_text("{"),
        "duo_jax.json is not JSON",
    ),
    "another config": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(models.llama(num_hidden_layers=1, intermediate_size=64))
        ),
        "9 unknown: ",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_damaged_checkpoint(folder, assert_refused, change, message):
    checkpoint = folder.parent / "checkpoint"
    main([str(folder), str(checkpoint)])
    change(checkpoint)
    assert_refused(message, "--to-hf", checkpoint, folder.parent / "back")
    assert names(folder.parent) == ["checkpoint", "model"]
    with pytest.raises(InputError, match=message.split(";")[0]):
        pretrained.load_params(checkpoint)


@pytest.mark.slow
def test_a_real_process_says_one_line(folder):
    cut(folder)
    command = [sys.executable, "-W", "error", "-m", "convert", folder, folder.parent / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_repository())
    assert done.returncode == 2
    assert done.stdout == ""
    stderr = without_plugin_log(done.stderr)
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"error: {folder}/model.safetensors is not a complete")
    assert names(folder.parent) == ["model"]


def test_help_reads_well():
    command = [sys.executable, "-W", "error", "-m", "convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_repository())
    assert done.returncode == 0, done.stderr
    assert without_plugin_log(done.stderr) == ""
    for word in ("SRC", "DST", "--to-hf", "--dtype", "--allow-pickle", "--max-shard-gb"):
        assert word in done.stdout
    _, flags = done.stdout.split("options", 1)  # above, in every help: --no-compile-cache
    assert "--no-" not in flags


def _repository() -> pathlib.Path:
    return pathlib.Path(__file__).parents[2]


def test_a_checkpoint_whose_name_is_not_utf_8(folder, tmp_path, assert_refused):
    """A legal name, but orbax takes no other than UTF-8."""
    assert_refused("must be UTF-8", folder, tmp_path / "a\udcff")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
