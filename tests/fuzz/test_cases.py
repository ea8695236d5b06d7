"""The inputs that once ended in a traceback, a wrong number or all memory: one line each now.

Each folder in cases/ has a WHAT.txt, which says what happened, and the input, unless it is built
here because it is large or no file. Each goes through the command that would read it.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from duo_jax import generate
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.evaluate.results.rows import Rows
from duo_jax.heads.pattern import choose_retrieval_heads
from duo_jax.plan.__main__ import main as plan
from duo_jax.schema import checksums
from tests import models
from tests.fuzz.contract import attempt
from tests.fuzz.seeds import CASES, DEMO
from tests.fuzz.test_fuzz_checkpoints import State
from train.identify.__main__ import main as identify
from train.workdir import WorkDir

_NAMES = sorted(folder.name for folder in CASES.iterdir())
_PROMPT = ["--prompt", "x", "--max-new-tokens", "1"]


def names(kind: str) -> list[str]:
    return [name for name in _NAMES if name.rpartition("-")[0] == kind]


def demo_with(folder: pathlib.Path, case: str) -> pathlib.Path:
    """Return the demo model's folder with the files of a case in it."""
    made = shutil.copytree(DEMO, folder / "model")
    return shutil.copytree(CASES / case, made, dirs_exist_ok=True)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what loads tokenizers, which takes seconds and is no part of any reader's time."""
    load_tokenizer(DEMO)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Return a function that runs a command and returns its one line."""

    def run(main: Callable[[list[str]], None], *words: str | pathlib.Path) -> str:
        def call() -> None:
            with pytest.raises(SystemExit) as exit_:
                main([*map(str, words)])
            assert exit_.value.code == 2

        attempt(call)
        printed = capsys.readouterr()
        [line] = printed.err.splitlines()
        assert line.startswith("error: ")
        assert len(line) < 2_200
        return line

    return run


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", names("config"))
def test_a_config_is_refused_by_every_command(case, refused, tmp_path):
    model = demo_with(tmp_path, case)
    lines = {refused(main, "--model", model, *more)
             for main, more in ((generate.main, _PROMPT), (plan, []), (identify, []))}  # fmt: skip
    assert len(lines) == 1


@pytest.mark.parametrize("case", names("index"))
def test_an_index_is_refused(case, refused, tmp_path):
    model = demo_with(tmp_path, case)
    (model / "model.safetensors").unlink()
    refused(generate.main, "--model", model, *_PROMPT)


def test_a_long_header_is_refused(refused, tmp_path):
    """safetensors-0995cd: a file with a header of 60 MB took minutes."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor.{number:07}": entry for number in range(700_000)}).encode()
    assert len(header) > 50e6
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "header" in refused(generate.main, "--model", model, *_PROMPT)


@pytest.mark.parametrize(
    ("case", "file"),
    [("orbax-checkpoint-4d6452", "duo_jax.json"), ("tokenizer-570053", "generation_config.json")],
)
def test_a_file_of_brackets_is_refused(case, file, refused, tmp_path):
    model = demo_with(tmp_path, case)
    (model / file).write_text("[" * 3_000 + "]" * 3_000)
    assert file in refused(generate.main, "--model", model, *_PROMPT)


@pytest.mark.parametrize("case", sorted({*names("pattern")} - {"pattern-cc6ecb"}))
def test_a_pattern_is_refused(case, refused):
    refused(generate.main, "--pattern", CASES / case, *_PROMPT)


def test_an_argument_of_another_type_is_refused():
    """pattern-cc6ecb: sparsity="" was a TypeError."""
    with pytest.raises(InputError, match=r"^sparsity '' is not a number from 0 to 1$"):
        choose_retrieval_heads(np.ones((2, 2)), sparsity="")


@pytest.mark.parametrize("case", names("presets"))
def test_a_preset_is_refused(case, refused, tmp_path):
    assert "identify.json" in refused(identify, "--model", demo_with(tmp_path, case))


def test_a_flipped_bit_that_leaves_a_valid_text_is_read_as_it_is():
    """text-177860: "words" became "wordr". It loads, because nothing in the file tells.

    The frame has no checksum of its content, which writers may leave out, and unpacks to the
    length that it names: for any reader it is another valid file. What duo_jax.data guarantees is
    that the text is the one that zstandard unpacks. With a checksum the same flip is noticed.
    """
    file = CASES / "text-177860" / "a.jsonl.zst"
    frame = zstandard.get_frame_parameters(file.read_bytes())
    unpacked = zstandard.ZstdDecompressor().decompress(file.read_bytes())
    assert not frame.has_checksum
    assert frame.content_size == len(unpacked)
    lines = unpacked.decode().splitlines()
    assert load_documents([str(file)]) == [json.loads(line)["text"] for line in lines]
    assert "wordr" in lines[0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "no text found"),
        (b'{"text": ""}\n', "no text found"),
        (b"x", "more than 16,777,216 characters"),
    ],
    ids=["newlines", "no texts", "a line"],
)
def test_a_small_file_that_unpacks_to_much_is_refused(content, message, refused, tmp_path):
    """text-27d4a5: 8 KB of newlines took 3.6 GB."""
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.ZstdCompressor().compress(content * ((256 << 20) // len(content))))
    assert file.stat().st_size < 40_000
    assert message in refused(identify, "--text", file, "--workdir", tmp_path / "w")


def test_the_root_is_no_text(refused, tmp_path, monkeypatch):
    """text-e8252c: source '/' walked all files, and stumbled over one that had gone."""
    monkeypatch.setattr("duo_jax.data.documents._MOST_FILES", 500)
    refused(identify, "--text", "/", "--workdir", tmp_path / "w")


# Saved conversations. The cases belong to a model and a format that are no more: what was done to
# them is done to a cache of today, and they themselves are given to it as well.


@pytest.fixture(scope="module")
def conversation(tmp_path_factory) -> tuple[list[str], pathlib.Path]:
    """Return the words that load a conversation, but for its folder; and that folder."""
    root = tmp_path_factory.mktemp("conversation")
    model = models.write_hf(root / "model", models.llama(num_hidden_layers=1, vocab_size=600))
    models.write_tokenizer(model)
    words = ["--model", str(model), "--pattern", "none", "--max-new-tokens", "0"]
    generate.main([*words, "--prompt", "Remember them.", "--save-cache", str(root / "cache")])
    return words, root / "cache"


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 4]) + content[-4:]


def with_another_logits_at(content: bytes) -> bytes:
    marker = json.loads(content)
    del marker[checksums.KEY]
    return checksums.seal(marker | {"logits_at": [10**6]}).encode() + b"\n"


@pytest.mark.parametrize("case", names("savedcache"))
def test_a_saved_conversation_is_refused(case, refused, conversation, tmp_path):
    words, saved = conversation
    [file] = (file for file in (CASES / case).iterdir() if file.name != "WHAT.txt")
    right = (saved / file.name).read_bytes()
    contents = [file.read_bytes()]
    if case == "savedcache-e52e62":
        contents.append(with_another_logits_at(right))
    elif file.suffix == ".safetensors":
        contents.append(flipped(right))
    for number, content in enumerate(contents):
        cache = shutil.copytree(saved, tmp_path / f"cache{number}")
        (cache / file.name).write_bytes(content)
        line = refused(generate.main, *words, "--prompt", "x", "--load-cache", cache)
        assert str(cache) in line


# Work folders.


def test_settings_of_brackets_are_refused(refused, tmp_path):
    work = shutil.copytree(CASES / "workfolder-2f163a", tmp_path / "work")
    assert "nested more than" in refused(identify, "--workdir", work)


def one_line(capsys) -> str:
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_rows_of_brackets_are_set_aside(tmp_path, capsys):
    """workfolder-63b539 loads: the line is set aside with a word, and its row is measured again."""
    case = shutil.copytree(CASES / "workfolder-63b539", tmp_path / "work")
    (case / "config.json").write_text("{}")
    with (case / "rows.jsonl").open("a") as file:
        file.write(checksums.seal({"key": "whole", "row": {"score": 1}}) + "\n")
    rows = attempt(lambda: Rows(case, {}))
    assert rows.keys() == ["whole"]
    assert "line 1 is nested more than 64 deep: set aside" in one_line(capsys)


@pytest.mark.parametrize("case", ["workfolder-9228f4", "workfolder-b071e9", "workfolder-d4d42c"])
def test_metrics_that_are_no_numbers_are_set_aside(case, tmp_path, capsys):
    """These load: the line is set aside with a word, so that no plot stumbles at a run's end."""
    work = shutil.copytree(CASES / case, tmp_path / "work")
    (work / "config.json").write_text("{}")
    with (work / "metrics.jsonl").open("a") as file:
        file.write(checksums.seal({"step": 2, "loss": 0.5}) + "\n")
    with contextlib.closing(WorkDir(work, {}, operational=())) as workdir:
        assert attempt(workdir.metrics) == [{"step": 2, "loss": 0.5}]
    assert "line 1" in one_line(capsys)


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(tmp_path, capsys):
    """training-checkpoints-76c621 loads, as what was there cannot be known, but not silently."""
    case = CASES / "training-checkpoints-76c621" / "workdir"
    work = shutil.copytree(case, tmp_path / "work")
    state = State(step=jnp.int32(0), gates=jnp.zeros(2))
    with contextlib.closing(WorkDir(work, {"a": 1}, operational=())) as workdir:
        assert workdir.restore(state) is state
    assert "there is no checkpoint in" in one_line(capsys)


def test_every_case_is_tried():
    """Each is named here, or its kind is."""
    text = pathlib.Path(__file__).read_text()
    kinds = ("config", "index", "pattern", "presets", "savedcache")
    assert [name for name in _NAMES if name not in text and not name.startswith(kinds)] == []
