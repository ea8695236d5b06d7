"""Tokenizer files that would end the process, take all memory or fail with a traceback."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data import tokenizer_calls
from duo_jax.errors import InputError
from duo_jax.session.detokenize import Detokenizer
from duo_jax.session.tokenization import load_tokenization
from tests.fuzz.seeds import DEMO

_TOKENIZER = json.loads((DEMO / "tokenizer.json").read_text())
_SETTINGS = json.loads((DEMO / "tokenizer_config.json").read_text())
_VOCABULARY = {"a": 2, "b": 3, "<|begin|>": 0, "<|end|>": 1}


def replacements(content: str, number: int, pattern: dict[str, str]) -> list[dict[str, Any]]:
    return [{"type": "Replace", "pattern": pattern, "content": content}] * number


def template(*ids: str) -> dict[str, Any]:
    single = [{"SpecialToken": {"id": i, "type_id": 0}} for i in ids]
    pair = [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    known = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def precompiled(charsmap: str) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


_ANY = {"Regex": "."}
_PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
_PADDING |= {"pad_type_id": 0, "pad_token": "[PAD]"}
_DAMAGED = {
    "aborts": ({"model": {"continuing_subword_prefix": "\0"}}, "subword_prefix is '.x00', which"),
    "half a character": ({"model": {"continuing_subword_prefix": "é"}}, "subword_prefix"),
    "8 GB": (
        {"normalizer": {"type": "Sequence", "normalizers": replacements("a" * 100, 3, _ANY)}},
        "normalizer: its replacements make a text more than 256 times",
    ),
    "doubles": (
        {"decoder": {"type": "Sequence", "decoders": replacements("a", 30, {"String": ""})}},
        "decoder: its replacements make a text more than 256 times",
    ),
    "long content": (
        {"normalizer": replacements("a" * 1000, 1, _ANY)[0]},
        "normalizer: 'content' has more than 256 characters",
    ),
    "long padding": (
        {"padding": {**_PADDING, "strategy": {"Fixed": 2_000_000_000}}},
        "padding: it is longer than 1,048,576 tokens",
    ),
    "many tokens": (
        {"post_processor": template(*["<s>"] * 2_000)},
        "post_processor: 'single' has more than 1,024 items",
    ),
    "many words": ({"model": {"max_input_chars_per_word": 10**9}}, "max_input_chars_per_word"),
    "empty pattern": ({"normalizer": replacements("x", 1, {"String": ""})[0]}, "cannot be loaded"),
    "empty matches": ({"normalizer": replacements("x", 1, {"Regex": ""})[0]}, "cannot be loaded"),
    "no map": ({"normalizer": precompiled("AAAA")}, "cannot be loaded: Precompiled"),
    "map of 4 GB": ({"normalizer": precompiled("/////w==")}, "cannot be loaded: Precompiled"),
    "map to nowhere": ({"normalizer": precompiled("CAAAAP////8AAAAAAAAA")}, "out of bounds"),
    "unknown token": ({"post_processor": template("zz")}, "cannot be loaded: no entry found"),
    "no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot be loaded"),
}


@pytest.fixture
def changed(tmp_path) -> Callable[..., Any]:
    """Return a function that copies the demo model's folder, and changes its tokenizer there."""

    def make(changes: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
        folder = shutil.copytree(DEMO, tmp_path / "model")
        model = changes.get("model", {})
        model = model if "type" in model else {**_TOKENIZER["model"], **model}
        (folder / "tokenizer.json").write_text(
            json.dumps({**_TOKENIZER, **changes, "model": model})
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(_SETTINGS | (settings or {})))
        return folder

    return make


@pytest.mark.parametrize("case", _DAMAGED)
def test_a_damaged_tokenizer_is_refused_at_load_in_one_line(case, changed, capfd):
    changes, message = _DAMAGED[case]
    with pytest.raises(InputError, match=message):
        load_tokenizer(changed(changes))
    assert "panicked" not in capfd.readouterr().err


def test_a_prefix_that_all_merges_have_is_read(changed):
    model = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"]}
    folder = changed({"model": model | {"continuing_subword_prefix": "##"}, "pre_tokenizer": None})
    assert load_tokenization(folder).encode("ab")[-1] == 2


_UNKNOWN = {
    "WordLevel": {"type": "WordLevel", "vocab": _VOCABULARY, "unk_token": "[UNK]"},
    "WordPiece": {
        "type": "WordPiece",
        "vocab": _VOCABULARY,
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "Unigram": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", -2.0]]},
}


@pytest.mark.parametrize("kind", _UNKNOWN)
def test_a_text_with_unknown_characters_is_refused_in_one_line(kind, changed):
    tokenization = load_tokenization(changed({"model": _UNKNOWN[kind], "pre_tokenizer": None}))
    assert len(tokenization.encode("a", continues=True)) == 1
    for continues in (False, True):
        with pytest.raises(InputError, match="model cannot encode this text: "):
            tokenization.encode("Hello", continues=continues)


def test_a_regular_expression_that_gives_up_is_one_line(changed, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|aa)+$"}, "behavior": "Isolated"}
    tokenization = load_tokenization(changed({"pre_tokenizer": split | {"invert": False}}))
    with pytest.raises(InputError, match=r"cannot encode this text: .*retry-limit"):
        tokenization.encode("a" * 40 + "!")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("model_max_length", v) for v in ("x", [], {}, True, 0, -1)]
    + [(flag, "x") for flag in ("add_bos_token", "add_eos_token", "split_special_tokens")]
    + [("clean_up_tokenization_spaces", 1)],
)
def test_settings_have_their_types(name, value, changed):
    with pytest.raises(InputError, match=rf"tokenizer_config.json: {name} is"):
        load_tokenizer(changed({}, {name: value}))


@pytest.mark.parametrize("value", [None, 5, 10**30, 1.5e30])
def test_any_length_is_accepted(value, changed):
    assert load_tokenizer(changed({}, {"model_max_length": value})) is not None


@pytest.mark.parametrize("settings", [{"eos_token": ""}, {"unk_token": ""}])
def test_an_empty_special_token_counts_as_none(settings, changed):
    tokenizer = load_tokenizer(changed({}, settings))
    assert not set(settings) & set(tokenizer.special_tokens_map)
    assert Detokenizer(tokenizer).push([41]) == "H"


_TEXT = (DEMO / "tokenizer.json").read_text()
_TEXTS = {
    "twice": (_TEXT.replace("{", '{"model": {},', 1), "has a key twice"),
    "escaped": (_TEXT.replace('"model"', '"mod\\u0065l"', 1), "escapes in a key"),
    "twice in the model": (_TEXT.replace('"dropout"', '"type": "WordLevel", "dropout"'), "twice"),
    "deep": ('{"normalizer": ' + "[" * 100_000, "nested too deep"),
    "cut": (_TEXT[:1000], "is not JSON"),
    "a list": ("[]", "is not JSON"),
    "empty": ("", "is not JSON"),
}


@pytest.mark.parametrize("case", _TEXTS)
def test_a_tokenizer_file_is_json_without_a_key_twice(case, changed):
    folder, (text, message) = changed({}), _TEXTS[case]
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_have_no_key_twice(name, changed):
    folder = changed({})
    (folder / name).write_text('{"bos_token": "a", "bos_token": "b"}')
    with pytest.raises(InputError, match=f"{name} has the key 'bos_token' twice"):
        load_tokenizer(folder)


def test_a_huge_tokenizer_is_not_read(changed):
    folder = changed({})
    os.truncate(folder / "tokenizer.json", (64 << 20) + 1)
    with pytest.raises(InputError, match=r"tokenizer.json has more than 67,108,864 bytes"):
        load_tokenizer(folder)


def test_what_others_write_to_stderr_meanwhile_comes_afterwards(capfd):
    with tokenizer_calls.without_panic_lines():
        os.write(2, b"kept\n")
        inside = capfd.readouterr().err
        thread = threading.Thread(target=_enter_too)  # must not take our file for the real one
        thread.start()
        thread.join()
    os.write(2, b"later\n")
    assert (inside, capfd.readouterr().err) == ("", "kept\ntoo\nlater\n")


def _enter_too():
    with tokenizer_calls.without_panic_lines():
        os.write(2, b"too\n")


def test_ctrl_c_stays_what_it_is():
    with pytest.raises(KeyboardInterrupt), tokenizer_calls.calling("m", "encode"):
        raise KeyboardInterrupt
    with pytest.raises(TypeError), tokenizer_calls.calling("m", "encode"):  # a defect of ours
        raise TypeError


def test_a_closed_stderr_is_no_matter():
    program = """
import os
from duo_jax.data import tokenizer_calls
os.close(2)
with tokenizer_calls.without_panic_lines():
    print("right")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("right\n", 0)
