"""Texts that continue others are encoded as the whole is, with no space that nobody wrote."""

import functools
import itertools
import pathlib
import tempfile

import pytest
from tokenizers import AddedToken, Regex, normalizers

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data import text_pieces
from duo_jax.data.text_pieces import PieceEncoder
from tests import models, sentencepiece_style

BYTE_LEVEL = "byte-level with a space"
every_scheme = pytest.mark.parametrize("scheme", [*sentencepiece_style.SCHEMES, BYTE_LEVEL])
WORDS = "The cat sat on the mat."
TEXTS = [
    *(WORDS, "\nQuestion: who did it?\nAnswer:", " and more", "on", "  two  spaces ", "\n\n", " "),
    *(
        "世界 😀 é",
        "[INST] x",
        "<s>",
        "<s>[INST] the </s>",
        "a</s> <s> b",
        "</s>the",
        "▁x",
        "<unk>",
    ),
]


@functools.cache
def tokenizer_named(scheme: str):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if scheme != BYTE_LEVEL:
            return load_tokenizer(sentencepiece_style.write(folder, scheme))
        file = models.write_tokenizer(folder) / "tokenizer.json"
        text = file.read_text()
        assert '"add_prefix_space": false' in text
        file.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
        return load_tokenizer(folder)


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@every_scheme
def test_a_continuation_is_what_the_whole_has_there(scheme):
    tokenizer = tokenizer_named(scheme)
    pieces, compared = PieceEncoder(tokenizer), 0
    for first, second in itertools.product(TEXTS, repeat=2):
        before, both = whole(tokenizer, first), whole(tokenizer, first + second)
        found = before + pieces.encode(second, before=before)
        # Where words are joined, or spaces, tokens may be as well, and the whole splits elsewhere.
        if first[-1] in ".>:é" and (second[0] != " " or first[-1] != ">"):
            assert found == both, (first, second)
            compared += 1
        assert decoded(tokenizer, found) == decoded(tokenizer, both)
    assert compared > 50


def decoded(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@every_scheme
def test_no_text_gains_a_space(scheme):
    tokenizer = tokenizer_named(scheme)
    text = "".join(TEXTS[:9])
    for end in range(1, len(text)):
        before = whole(tokenizer, text[:end])
        tokens = before + PieceEncoder(tokenizer).encode(text[end:], before=before)
        assert decoded(tokenizer, tokens).lstrip() == text  # ByteLevel's first space shows


@every_scheme
def test_how_far_a_text_is_spelled(scheme):
    tokenizer = tokenizer_named(scheme)
    pieces = PieceEncoder(tokenizer)
    for text in ("<s>[INST] the </s>\n<s>on", "the </s> on<s>the", "the cat", "世😀</s> é"):
        tokens = whole(tokenizer, text)
        assert pieces.spelled(tokens, text + " and more") == len(text)
        parts = [pieces.spelled(tokens[:end], text, cut_off=True) for end in range(len(tokens))]
        assert None not in parts
        for end, part in enumerate(parts):
            assert pieces.spelled(tokens[:end], text) in (None, part)
        assert pieces.spelled(tokens, "x" + text) is None
        assert pieces.spelled(tokens, text[:-1]) is None


def test_one_appended_text_in_full():
    """The right value, written out."""
    for scheme in ("first", "always", "legacy", "converted"):
        tokenizer = tokenizer_named(scheme)
        tokens = PieceEncoder(tokenizer).encode("\nQuestion: who")
        assert tokenizer.convert_ids_to_tokens(tokens) == ["<0x0A>", "Qu", "estion", ":", "▁who"]
        assert tokenizer.convert_ids_to_tokens(whole(tokenizer, "\nQ"))[0] == "▁"


def test_a_tokenizer_that_adds_nothing_is_not_copied(tmp_path, monkeypatch):
    plain = load_tokenizer(models.write_tokenizer(tmp_path))
    monkeypatch.delattr("tokenizers.Tokenizer.from_str")
    assert PieceEncoder(plain).encode(WORDS) == whole(plain, WORDS)


def test_what_is_unknown_is_no_special_token(tmp_path):
    """<unk> is an added token, and stands for every character that the vocabulary lacks."""
    file = sentencepiece_style.write(tmp_path, "always") / "tokenizer.json"
    file.write_text(file.read_text().replace('"byte_fallback": true', '"byte_fallback": false'))
    tokenizer = load_tokenizer(tmp_path)
    pieces = PieceEncoder(tokenizer)
    both = whole(tokenizer, "the世the<s>on")
    assert tokenizer.unk_token_id in both
    assert whole(tokenizer, "the") + pieces.encode("世the<s>on") == both


def test_added_tokens_may_take_the_spaces_around_them(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_style.write(tmp_path, "always"))
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    both = whole(tokenizer, "the cat  <tool>  sat")
    assert whole(tokenizer, "the") + PieceEncoder(tokenizer).encode(" cat  <tool>  sat") == both


def test_truncation_of_the_file_is_not_ours(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_style.write(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert len(PieceEncoder(tokenizer).encode(WORDS)) == 6


def test_only_the_beginning_of_a_text_is_changed(tmp_path):
    state = {"type": "Strip", "strip_left": True, "strip_right": True}
    kept = text_pieces._without_normalized_prefix(state)
    assert kept == {"type": "Strip", "strip_left": False, "strip_right": True}
    # "^" is the beginning of every line.
    tokenizer = load_tokenizer(sentencepiece_style.write(tmp_path))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("^t"), "T")
    assert decoded(tokenizer, PieceEncoder(tokenizer).encode("the\nthe")) == "the\nThe"
    assert decoded(tokenizer, whole(tokenizer, "the\nthe")) == "The\nThe"
