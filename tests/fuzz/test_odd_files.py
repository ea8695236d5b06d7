"""Names in folders that are no files: a pipe is waited for without an end, a device has none."""

import json
import os
import pathlib
import shutil
import signal

import pytest

from duo_jax import files, generate
from duo_jax.checkpoints.orbax_checkpoint import marker_of
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.checkpoints.weights import open_weights
from duo_jax.cli import workdir
from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.pattern import Pattern, load_pattern, save_pattern
from duo_jax.model.hf_config import read_config
from duo_jax.session import cache_files, tokenization
from duo_jax.session.generation_config import suggested_sampling
from tests.fuzz.contract import REFUSED, attempt
from tests.fuzz.seeds import DEMO
from train.identify.flags import default_config
from train.workdir import WorkDir

_READERS = {
    "config.json": read_config,
    "generation_config.json": tokenization.load_tokenization,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "special_tokens_map.json": load_tokenizer,
    "added_tokens.json": load_tokenizer,
    "chat_template.json": load_tokenizer,
    "chat_template.jinja": load_tokenizer,
    "model.safetensors": open_weights,
    "duo_jax.json": open_weights,
    "identify.json": lambda folder: default_config("m", folder),
    "pattern/config.json": lambda folder: load_pattern(folder / "pattern"),
    "pattern/full_attention_heads.tsv": lambda folder: load_pattern(folder / "pattern"),
    "cache.json": lambda folder: cache_files._read_marker(folder),
    "work/config.json": lambda folder: workdir.check(folder / "work", {}),
    "rows/rows.jsonl": lambda folder: Rows(folder / "rows", {}),
}
_KINDS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what loads tokenizers, which takes seconds and is no part of any reader's time."""
    load_tokenizer(DEMO)


@pytest.fixture(autouse=True)
def _soon():
    """Fail where a test hangs."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(20)
    yield
    signal.alarm(0)


def _late(*_):
    raise TimeoutError("it hangs")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("name", _READERS)
def test_what_is_no_file_is_refused_by_name(name, kind, tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    if name.startswith("rows"):
        Rows(folder / "rows", {})
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    _KINDS[kind](path)
    with pytest.raises(InputError, match=f"{path.name} cannot be read: it is a"):
        _READERS[name](folder)
    assert attempt(lambda: _READERS[name](folder)) is REFUSED


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_replaced_either(kind, tmp_path):
    path = tmp_path / "picture.png"
    _KINDS[kind](path)
    with pytest.raises(InputError, match=r"picture.png cannot be written: it is a .*; name a file"):
        files.write_bytes(path, b"content")
    rows = Rows(tmp_path / "rows", {})
    rows.add("a", {})
    (tmp_path / "rows" / "rows.jsonl").write_text("damaged")
    del rows
    _KINDS[kind](tmp_path / "rows" / "rows.damaged.jsonl")
    with pytest.raises(InputError, match=r"rows.damaged.jsonl cannot be written: it is a"):
        Rows(tmp_path / "rows", {})


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["_METADATA", "_CHECKPOINT_METADATA"])
def test_what_is_no_file_is_refused_in_checkpoints(name, kind, tmp_path):
    model, work = shutil.copytree(DEMO, tmp_path / "model"), tmp_path / "work"
    (model / "model.safetensors").unlink()
    (model / "duo_jax.json").write_text(json.dumps(marker_of("model")))
    workdir.claim(work, {})
    for folder in (model / "params", work / "checkpoints" / "1"):
        folder.mkdir(parents=True)
        _KINDS[kind](folder / name)
    for read in (lambda: open_weights(model), lambda: WorkDir(work, {}, operational=())):
        with pytest.raises(InputError, match=f"{name} cannot be read: it is a"):
            read()


def test_suggested_sampling_is_not_silently_ignored(tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(InputError, match="it is a folder, no file"):
        suggested_sampling(tmp_path)


def test_a_prompt_may_come_from_a_pipe():
    read, write = os.pipe()
    os.write(write, b"a prompt")
    os.close(write)
    assert generate._read_file(pathlib.Path(f"/dev/fd/{read}")) == "a prompt"
    os.close(read)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(name):
    pattern = Pattern(gates=load_pattern(DEMO / "pattern").gates, sink_size=1, recent_size=1)
    for use in (lambda: save_pattern(pattern, name), lambda: load_pattern(name)):
        with pytest.raises(InputError, match="characters that no file's name can hold"):
            use()
