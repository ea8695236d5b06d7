"""Tokenizers: tokenizer.json, damaged by its structure, and the settings beside it."""

import json
import shutil

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.session.detokenize import Detokenizer
from duo_jax.session.tokenization import load_tokenization
from tests.fuzz.contract import REFUSED, attempt, fuzzed
from tests.fuzz.hostile import json_files
from tests.fuzz.seeds import DEMO

_PROMPT = "Hello, world! \N{SNOWMAN} 12\n"
_WHOLE = json.loads((DEMO / "tokenizer.json").read_text())
_LETTERS = {letter: i for i, letter in enumerate(["<|begin|>", "<|end|>", "\u2581", *"Helo, wrd"])}
_BPE = {**_WHOLE["model"], "vocab": {**_LETTERS, "He": 15}, "merges": [["H", "e"]]}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [[x, -1.0] for x in _LETTERS]}
_WORDPIECE = {"type": "WordPiece", "unk_token": "<|end|>", "continuing_subword_prefix": "##"}
_WORDPIECE |= {"max_input_chars_per_word": 100, "vocab": _LETTERS}
_PIECES = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
_SPLIT = {"type": "Split", "pattern": {"Regex": "\\s+|\\p{L}+"}, "behavior": "Isolated"}
_SEEDS = [
    {**_WHOLE, "model": _BPE},
    {**_WHOLE, "model": _BPE | {"continuing_subword_prefix": "##", "merges": []}},
    {
        **_WHOLE,
        "model": _UNIGRAM,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, _REPLACE]},
        "pre_tokenizer": _PIECES,
        "decoder": {"type": "Sequence", "decoders": [_REPLACE, {"type": "Fuse"}]},
    },
    {
        **_WHOLE,
        "model": _WORDPIECE,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8AAAAAAAAA"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_SPLIT | {"invert": False}]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst"}
        | {"stride": 0},
    },
]


def _use(folder):
    tokenization = load_tokenization(folder)
    tokens = tokenization.encode(_PROMPT)
    tokenization.encode(_PROMPT, continues=True, before=tokens)
    detokenizer = Detokenizer(tokenization.tokenizer)
    return detokenizer.push(tokens) + detokenizer.finish()


def _attempt(content, name, folder):
    if not (folder / "tokenizer.json").exists():
        shutil.copytree(DEMO, folder, dirs_exist_ok=True)
        load_tokenizer(folder)  # imports, which take seconds
    (folder / name).write_bytes(content)
    return attempt(lambda: _use(folder), size=len(content))


@fuzzed(json_files([json.dumps(seed) for seed in _SEEDS]))
def test_a_damaged_tokenizer_is_refused_or_reads_a_prompt(content, folder):
    _attempt(content, "tokenizer.json", folder)


_SETTINGS = [
    (DEMO / "tokenizer_config.json").read_text(),
    json.dumps({"add_bos_token": True, "extra_special_tokens": ["<x>"], "unk_token": "<unk>"}),
    json.dumps({"added_tokens_decoder": {"0": {"content": "<|begin|>", "special": True}}}),
]


@fuzzed(json_files(_SETTINGS))
def test_damaged_settings_are_refused_or_read_a_prompt(content, folder):
    found = _attempt(content, "tokenizer_config.json", folder)
    if found is not REFUSED:
        json.loads(content)  # as everybody reads them


def test_the_seeds_are_read(tmp_path):
    """All but the damaged map; otherwise the damage is done to what is refused in any case."""
    for seed in _SEEDS[:3]:
        assert _attempt(json.dumps(seed).encode(), "tokenizer.json", tmp_path) is not REFUSED
