"""Streamed text: equal to decoding everything at once, for every tokenizer, division and stop."""

import functools
import itertools
import pathlib
import re
import tempfile

import numpy as np
import pytest

from duo_jax.checkpoints.pretrained import load_tokenizer, resolve
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError
from duo_jax.session.detokenize import Detokenizer
from tests import models

BAD = "\N{REPLACEMENT CHARACTER}"
FAMILY = "👩\u200d👩\u200d👧\u200d👦"
SNIPPETS = [
    *"abc xyz.,\n\t<>0_",
    *("  ", "    ", " the", "Hello", " world", "passkey", "<0x41>", "▁"),
    *("😀", FAMILY, "🏳️\u200d🌈", "👍🏽", "\U0001d518", "\U00010348"),
    *("你", "好", "世界", "龘", "日本語", "한국어", "नमस्ते"),
    *("e\u0301", "n\u0303\u0320", "é", "ü", "ß", "\u0301"),
    *("Привет", " мир", "ы", "ё", "שלום", "\u00a0", "\u2028"),
]


def _sentencepiece(decoder: str):
    """Return a tokenizer with byte fallback and a leading space, as Llama-2's."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁Hello", "▁the", "▁world", "Hello", "the", "▁мир", "世界", "你", "▁", "▁▁", "▁▁▁▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyzH.,Прив", "passkey"]
    vocab = [(piece, -float(i >= 259)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(tokenizer_models.Unigram(vocab, unk_id=0, byte_fallback=True))
    if decoder == "llama-2":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        spaces = decoders.Replace("▁", " ")
        parts = [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        parts = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@functools.cache
def tokenizer_named(name: str):
    if name == "byte-level":
        with tempfile.TemporaryDirectory() as folder:
            return load_tokenizer(models.write_tokenizer(pathlib.Path(folder)))
    return load_tokenizer(resolve("demo")) if name == "demo" else _sentencepiece(name)


BYTE_LEVEL = ["byte-level", "demo"]
SENTENCEPIECE = ["llama-2", "metaspace"]
every_tokenizer = pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCEPIECE)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer, ids: list[int], *, skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def random_text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SNIPPETS, rng.integers(1, 30)))


def random_chunks(ids: list[int], rng: np.random.Generator) -> list[list[int]]:
    """Divide at random places; some chunks are empty."""
    cuts = np.sort(rng.integers(0, len(ids) + 1, rng.integers(0, len(ids) + 4)))
    edges = [0, *cuts.tolist(), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def stream(detokenizer: Detokenizer, chunks: list[list[int]]) -> str:
    parts = [detokenizer.push(chunk) for chunk in chunks]
    parts.append(detokenizer.finish())
    assert detokenizer.text == "".join(parts)
    return detokenizer.text


def one_by_one(tokenizer, text: str, **options) -> Detokenizer:
    detokenizer = Detokenizer(tokenizer, **options)
    stream(detokenizer, [[i] for i in encode(tokenizer, text)])
    return detokenizer


@pytest.mark.one_in(2)
@every_tokenizer
def test_streamed_unicode_is_the_decoded_whole(name):
    tokenizer, rng = tokenizer_named(name), np.random.default_rng(0)
    for _ in range(60):
        text = random_text(rng)
        ids = encode(tokenizer, text)
        detokenizer = Detokenizer(tokenizer)
        result = stream(detokenizer, random_chunks(ids, rng))
        assert result == decode(tokenizer, ids)
        if name in BYTE_LEVEL:  # the others lose what their first token says about spaces
            assert result == text
        assert BAD not in result
        assert not detokenizer.stopped


@pytest.mark.one_in(4)
@every_tokenizer
@pytest.mark.parametrize("skip", [True, False], ids=["special skipped", "special shown"])
def test_streamed_garbage_is_the_decoded_whole(name, skip):
    """Tokens a bad model might choose: cut-off characters, lone bytes, special tokens."""
    tokenizer, rng = tokenizer_named(name), np.random.default_rng(1)
    single = [i for t, i in tokenizer.get_vocab().items() if len(t) == 1 or t.startswith("<0x")]
    bad = 0
    for _ in range(80):
        ids = encode(tokenizer, random_text(rng))[: rng.integers(1, 40)]
        number = rng.integers(0, 8)
        everything = rng.integers(0, len(tokenizer), number).tolist()
        for extra in (everything, rng.choice(single, number).tolist()):
            place = rng.integers(0, len(ids) + 1)
            ids[place:place] = extra
        result = stream(Detokenizer(tokenizer, skip_special_tokens=skip), random_chunks(ids, rng))
        whole = decode(tokenizer, ids, skip=skip)
        if name in SENTENCEPIECE:  # ASCII in front of bad bytes stays what it was
            whole = "".join(
                ours if theirs == BAD and ours.isascii() else theirs
                for ours, theirs in zip(result, whole, strict=True)
            )
        assert result == whole
        bad += BAD in result
    assert bad > 10


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_text_comes_as_soon_as_its_characters_are_whole(name):
    tokenizer, rng = tokenizer_named(name), np.random.default_rng(2)
    for _ in range(30):
        ids = encode(tokenizer, random_text(rng))
        detokenizer = Detokenizer(tokenizer)
        for end in range(1, len(ids) + 1):
            detokenizer.push(ids[end - 1 : end])
            assert detokenizer.text == decode(tokenizer, ids[:end]).removesuffix(BAD)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_only_runs_of_byte_tokens_wait_for_their_end(name):
    tokenizer = tokenizer_named(name)
    ids = encode(tokenizer, "Hello 😀龘a the world")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "▁Hello"
    assert pieces[2:9] == [f"<0x{byte:02X}>" for byte in "😀龘".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == [
        *("Hello", " "),
        *[""] * 7,
        *("😀龘a", " the", " world"),
    ]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_newline_does_not_wait_although_it_is_a_byte_token(name):
    tokenizer = tokenizer_named(name)
    the, newline, first, second = tokenizer.convert_tokens_to_ids(
        ["the", "<0x0A>", "<0xC3>", "<0xA9>"]
    )
    detokenizer = Detokenizer(tokenizer)
    ids = [newline, newline, the, newline, first, second, newline, first, the]
    texts = [detokenizer.push([i]) for i in ids]
    assert texts[:-1] == ["\n", "\n", "the", "\n", *[""] * 4]
    assert texts[-1] == 4 * BAD + "the"  # as decoded at once
    detokenizer = Detokenizer(tokenizer, stop=["\n"])
    assert detokenizer.push([the]) == "the"
    assert detokenizer.push([newline]) == ""
    assert detokenizer.stopped


@every_tokenizer
def test_a_character_that_stays_incomplete_ends_the_text_as_decoded(name):
    tokenizer = tokenizer_named(name)
    ids = encode(tokenizer, "ok 😀")
    for missing in (1, 2, 3):
        detokenizer = Detokenizer(tokenizer)
        pushed = "".join(detokenizer.push([i]) for i in ids[:-missing])
        assert pushed == "ok "
        rest = detokenizer.finish()
        assert rest.strip(BAD) == ""
        assert pushed + rest == decode(tokenizer, ids[:-missing])
        assert rest.startswith(BAD)


@every_tokenizer
def test_a_genuine_replacement_character_is_text(name):
    tokenizer = tokenizer_named(name)
    for text in (BAD, f"a{BAD}", f"{BAD}b", f"a{BAD}{BAD} b"):
        ids = encode(tokenizer, text)
        assert one_by_one(tokenizer, text).text == decode(tokenizer, ids) == text


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_only_the_first_token_loses_its_leading_space(name):
    tokenizer = tokenizer_named(name)
    hello, spaces = tokenizer.convert_tokens_to_ids(["▁Hello", "▁▁"])
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([hello]) for _ in range(20)] == ["Hello", *[" Hello"] * 19]
    ids = [spaces, spaces, hello, hello]
    detokenizer = Detokenizer(tokenizer)
    assert stream(detokenizer, [[i] for i in ids]) == decode(tokenizer, ids)


@every_tokenizer
def test_special_and_unknown_tokens_have_no_text(name):
    tokenizer = tokenizer_named(name)
    special = tokenizer.all_special_ids[-1]
    unknown = len(tokenizer) + 5
    ids = [j for i in encode(tokenizer, "a😀 b") for j in (special, i, *[unknown] * 12)]
    assert stream(Detokenizer(tokenizer), [[i] for i in ids]) == "a😀 b"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert stream(shown, [[special]]) == tokenizer.convert_ids_to_tokens(special)


def test_the_tokenizer_is_never_asked_to_tidy_spaces():
    tokenizer = tokenizer_named("metaspace")
    words = [tokenizer.convert_tokens_to_ids(t) for t in ("the", "▁", ".", "▁", ",")]
    tokenizer = _sentencepiece("metaspace")
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(words) == "the.,"
    assert stream(Detokenizer(tokenizer), [[i] for i in words]) == "the . ,"


@pytest.mark.parametrize("name", ["byte-level", "llama-2"])
@pytest.mark.parametrize("kind", ["words", "endless broken characters"])
def test_the_work_per_token_does_not_grow(name, kind):
    tokenizer, sizes = tokenizer_named(name), []

    class Counting:
        def __getattr__(self, attribute):
            return getattr(tokenizer, attribute)

        def decode(self, ids, **options):
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    if kind == "words":
        ids = encode(tokenizer, "Hello the world 你 " * 100)
    else:
        ids = 500 * encode(tokenizer, "😀")[-2:-1]
    detokenizer = Detokenizer(Counting())
    assert stream(detokenizer, [[i] for i in ids]) == decode(tokenizer, ids)
    assert sum(sizes) < 25 * len(ids)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the first complete stop string, found one character at a time."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.one_in(2)
@every_tokenizer
def test_text_ends_before_the_first_stop_string(name):
    tokenizer, rng = tokenizer_named(name), np.random.default_rng(3)
    alphabet = ["a", "b", "c", " ", "你", "😀"]
    outcomes = set()
    for _ in range(200):
        ids = encode(tokenizer, "".join(rng.choice(alphabet[: rng.integers(2, 7)], 25)))
        text = decode(tokenizer, ids)
        stops = ["".join(rng.choice(alphabet, rng.integers(1, 6))) for _ in range(3)]
        stops[0] = text[(start := rng.integers(0, 20)) : start + rng.integers(2, 10)]
        stops = stops[: rng.integers(0, 4)]
        detokenizer = Detokenizer(tokenizer, stop=stops)
        result = stream(detokenizer, random_chunks(ids, rng))
        assert (result, detokenizer.stopped) == cut(text, stops)
        outcomes.add(detokenizer.stopped)
    assert outcomes == {True, False}


def test_only_what_may_begin_a_stop_string_is_held_back():
    tokenizer, rng = tokenizer_named("byte-level"), np.random.default_rng(4)
    for _ in range(100):
        ids = encode(tokenizer, "".join(rng.choice(["a", "b", "c"], 20)))
        stops = ["".join(rng.choice(["a", "b", "c"], rng.integers(1, 7))) for _ in range(2)]
        detokenizer = Detokenizer(tokenizer, stop=stops)
        for end in range(1, len(ids) + 1):
            detokenizer.push(ids[end - 1 : end])
            text, stopped = cut(decode(tokenizer, ids[:end]), stops)
            assert detokenizer.stopped == stopped
            if not stopped:
                beginnings = {s[:n] for s in stops for n in range(len(s))}
                text = text[: len(text) - max(n for n in range(len(text) + 1)
                                              if text[len(text) - n :] in beginnings)]  # fmt: skip
            assert detokenizer.text == text


@every_tokenizer
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the world", ["the"], ""),
        ("a the world", ["the", "world"], "a "),
        ("passkey", ["ssk"], "pa"),
        ("a\n\nb", ["\n\n"], "a"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("abcd", ["abcde", "bc"], "a"),
        ("xabc", ["bc", "abc"], "x"),
        ("a 😀 b", ["😀"], "a "),
        ("a 你好", ["你好吗", "好"], "a 你"),
        ("the wor", ["world"], "the wor"),
        ("the", [], "the"),
    ],
)
def test_stop_strings(name, text, stop, expected):
    detokenizer = one_by_one(tokenizer_named(name), text, stop=stop)
    assert detokenizer.text == expected
    assert detokenizer.stopped == (expected != text)


SPECIAL_STOPS = [
    ("the</s>world", ["</s>"], "the"),
    ("the</s>world", ["e</s>w"], "th"),
    ("the</s>world", ["</s>", "e</s>"], "th"),
    ("the</s>world", ["/s"], "the"),  # as the harness's own model, which looks at shown tokens
    ("the</s>world", [">w"], "the"),
    ("the</s>world", ["</s>\n"], "theworld"),
    ("a<s></s>b", ["<s></s>"], "a"),
    ("a<s></s>b", ["a</s>"], ""),  # <s> is in no stop string, and no part of the text
    ("a<s>b</s>c", ["</s>"], "ab"),
    ("a<s>b</s>c", ["</s>c", "<s>c"], "ab"),
    ("世界</s>a", ["</s>"], "世界"),
    ("a 😀</s>\nb", ["</s>\n"], "a 😀"),
    ("</s>", ["</s>"], ""),
]


@pytest.mark.parametrize(("text", "stop", "expected"), SPECIAL_STOPS)
@every_tokenizer
def test_a_stop_string_may_hold_special_tokens(name, text, stop, expected):
    tokenizer, rng = tokenizer_named(name), np.random.default_rng(6)
    special = {"demo": ("<|begin|>", "<|end|>")}.get(name, ("<s>", "</s>"))
    names = dict(zip(("<s>", "</s>"), special, strict=True))
    if "/s" in stop:
        stop = [special[1][1:-1]]
    stop = [functools.reduce(lambda s, old: s.replace(old, names[old]), names, s) for s in stop]
    ids = []  # every piece as a continuation, which gains no space
    for piece in re.split("(</?s>)", text):
        if piece in names:
            ids.append(tokenizer.convert_tokens_to_ids(names[piece]))
        elif piece:
            ids += PieceEncoder(tokenizer).encode(piece)
    for _ in range(5):
        detokenizer = Detokenizer(tokenizer, stop=stop)
        assert stream(detokenizer, random_chunks(ids, rng)) == expected
        visible = re.sub("</?s>", "", text)
        assert detokenizer.stopped == (visible != expected or stop == [special[1]])


def test_a_special_token_stops_at_once():
    """Even behind bytes that could go on, so that nothing more is written into a cache."""
    tokenizer = tokenizer_named("llama-2")
    ids = PieceEncoder(tokenizer).encode("龘")
    assert len(ids) == 3
    detokenizer = Detokenizer(tokenizer, stop=["</s>"])
    assert [detokenizer.push([i]) for i in ids] == ["", "", ""]
    assert detokenizer.push([tokenizer.eos_token_id]) == "龘"
    assert detokenizer.stopped
    held = Detokenizer(tokenizer, stop=["a</s>b"])
    a = tokenizer.convert_tokens_to_ids("a")
    assert [held.push([i]) for i in (a, tokenizer.eos_token_id)] == ["", ""]
    assert held.finish() == "a"
    assert not held.stopped


def test_nothing_comes_after_a_stop():
    tokenizer = tokenizer_named("byte-level")
    detokenizer = Detokenizer(tokenizer, stop="the")  # one string is not three letters
    assert detokenizer.push(encode(tokenizer, "take the vault")) == "take "
    assert detokenizer.stopped
    assert detokenizer.push(encode(tokenizer, " and more")) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.text == "take "


def test_a_held_beginning_is_returned_by_finish():
    tokenizer = tokenizer_named("byte-level")
    detokenizer = Detokenizer(tokenizer, stop=["vaults"])
    assert detokenizer.push(encode(tokenizer, "the vault")) == "the "
    assert detokenizer.finish() == "vault"
    assert not detokenizer.stopped
    assert detokenizer.finish() == ""
    with pytest.raises(RuntimeError, match="after finish"):
        detokenizer.push([5])


def test_an_incomplete_character_can_complete_a_stop_string_at_the_end():
    tokenizer = tokenizer_named("byte-level")
    detokenizer = Detokenizer(tokenizer, stop=[f"a{BAD}"])
    assert detokenizer.push(encode(tokenizer, "ba😀")[:-1]) == "b"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped


def test_no_tokens_are_no_text():
    detokenizer = Detokenizer(tokenizer_named("demo"))
    assert detokenizer.push([]) == detokenizer.finish() == detokenizer.text == ""


def test_numpy_tokens_are_tokens():
    tokenizer = tokenizer_named("demo")
    detokenizer = Detokenizer(tokenizer)
    for i in np.asarray(encode(tokenizer, "the vault"), np.int32):
        detokenizer.push([i.item()])
    assert detokenizer.text == "the vault"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError) as caught:
        Detokenizer(tokenizer_named("demo"), stop=["a", ""])
    assert str(caught.value) == "a stop string is empty; nothing could be generated before it"


@pytest.mark.parametrize("name", ["llama-2", "metaspace"])
def test_a_continuation_keeps_its_leading_space(name):
    tokenizer = tokenizer_named(name)
    whole = tokenizer("Hello the world", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt
    alone, going_on = Detokenizer(tokenizer), Detokenizer(tokenizer, context=prompt)
    rest = whole[len(prompt) :]
    assert alone.push(rest) + alone.finish() == "the world"
    assert going_on.push(rest) + going_on.finish() == " the world"
