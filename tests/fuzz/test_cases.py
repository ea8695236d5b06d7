"""The inputs that once ended in a traceback, a wrong number or all memory: one line each now.

Each folder in cases/ has a WHAT.txt, which says what happened, and the input, unless it is built
here because it is large or no file. Each goes through the command that would read it.
"""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from duo_jax import generate
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.heads.pattern import choose_retrieval_heads
from duo_jax.plan.__main__ import main as plan
from tests.fuzz.contract import attempt
from tests.fuzz.seeds import CASES, DEMO
from train.identify.__main__ import main as identify

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


@pytest.mark.usefixtures("arguments_pass")
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


@pytest.mark.slow  # under the tests' type checker a line of JSON takes longer than without
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "no text found"),
        (b'{"text": ""}\n', "no text found"),
        (b"x", "more than 33,554,432 characters"),
        (b'{"text": "' + b"x" * (16 << 20) + b'"}\n', "unpacks to more than 1000 times its size"),
    ],
    ids=["newlines", "no texts", "a line", "texts"],
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
