"""Calibration samples: pure functions of (seed, index), and exactly what they claim to be."""

import dataclasses
import functools
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data.passkey_templates import NATO, ORDINALS, tokens_per_word, word_list
from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from tests import models, sentencepiece_style
from tests.passkeys import BARE, INDICES, SMALL, answers_of, same


@pytest.mark.parametrize("scheme", ["first", "legacy"])
def test_joined_parts_gain_no_spaces(scheme, make, tmp_path):
    """SentencePiece-style tokenizers put one before every text; here only before the first part."""
    tokenizer = load_tokenizer(sentencepiece_style.write(tmp_path, scheme))
    sampler = make(tokenizer=tokenizer, text=["One.\nTwo."] * 200)
    sample = sampler.sample(0)
    text = tokenizer.decode(sample.tokens)
    assert text.startswith(f"<s> {SMALL.intro}")
    assert "  " not in text
    assert "\n " not in text


def test_defaults_are_the_papers():
    config = PasskeyConfig()
    assert (config.num_passkeys, config.passkey_words, config.words) == (10, 32, "nato")
    assert (config.min_length, config.max_length, config.num_lengths) == (1000, 32_000, 50)
    assert len(set(NATO)) == 26
    assert sorted(word[0] for word in NATO) == [chr(ord("a") + i) for i in range(26)]
    assert ORDINALS[:10] == [
        *("first", "second", "third", "fourth", "fifth"),
        *("sixth", "seventh", "eighth", "ninth", "tenth"),
    ]


def test_sample_is_a_pure_function_of_seed_and_index(make):
    sampler = make()
    in_order = [sampler.sample(i) for i in INDICES]
    backwards = {i: sampler.sample(i) for i in reversed(INDICES)}
    for i in INDICES:
        assert same(backwards[i], in_order[i])
    for i in (0, 7, 39):
        assert same(make().sample(i), in_order[i])


def test_seeds_streams_and_indices_differ(make):
    sampler = make()
    variants = [sampler.sample(i).tokens.tobytes() for i in INDICES]
    variants += [make(seed=seed).sample(0).tokens.tobytes() for seed in (1, 2)]
    variants += [make(stream=stream).sample(0).tokens.tobytes() for stream in (1, 2)]
    variants += [make(seed=1, stream=1).sample(0).tokens.tobytes()]
    assert len(set(variants)) == len(variants)


def test_every_passkey_is_hidden_once_and_asked_once(make, tokenizer):
    sampler = make()
    for i in INDICES:
        sample = sampler.sample(i)
        context = tokenizer.decode(sample.tokens[: sample.tail_start])
        tail = tokenizer.decode(sample.tokens[sample.tail_start :])
        answers = answers_of(sample, tokenizer)
        assert len(answers) == 3
        for answer in answers:
            words = answer.split()
            assert len(words) == 4
            assert set(words) <= set(NATO)
            assert context.count(answer) == 1
            assert tail.count(answer) == 1


def test_each_question_gets_the_passkey_of_its_name(make, tokenizer):
    orders = set()
    sampler = make()
    for i in INDICES:
        sample = sampler.sample(i)
        text = tokenizer.decode(sample.tokens)
        hidden = re.findall(r"this is the (\w+) passkey to the vault:((?: \w+)+)\.", text)
        assert [name for name, _ in hidden] == ORDINALS[:3]  # named by depth
        asked = re.findall(r"The (\w+) passkey to the vault is:((?: \w+)+)\.", text)
        assert dict(asked) == dict(hidden)
        assert [answer for _, answer in asked] == answers_of(sample, tokenizer)
        assert list(np.argsort(np.argsort(sample.depths))) == [
            ORDINALS.index(name) for name, _ in asked
        ]
        orders.add(tuple(name for name, _ in asked))
    assert len(orders) == 6  # asked in every order


def test_tail_is_questions_and_answers_only(make, tokenizer):
    question = r"What is the (\w+) passkey to the vault\? The \1 passkey to the vault is:"
    unit = re.compile(rf"{question}(?: [a-z]+){{4}}\.\n\n")
    sampler = make()
    for i in INDICES:
        sample = sampler.sample(i)
        tail = tokenizer.decode(sample.tokens[sample.tail_start :])
        assert len(unit.findall(tail)) == 3
        assert unit.sub("", tail) == ""


def needle_starts(sample, tokenizer) -> list[int]:
    """Token positions of the needles."""
    mark = tokenizer("\n\nTake note: this is the", add_special_tokens=False).input_ids
    tokens = sample.tokens.tolist()
    starts = range(sample.tail_start - len(mark))
    return [i for i in starts if tokens[i : i + len(mark)] == mark]


def test_needles_lie_at_their_drawn_depths(make, tokenizer):
    """Depth is counted in haystack tokens: what stands before, less the needles before."""
    config = SMALL
    encode = functools.partial(tokenizer, add_special_tokens=False)
    depths = []
    sampler = make()
    for i in INDICES:
        sample = sampler.sample(i)
        text = tokenizer.decode(sample.tokens[: sample.tail_start])
        needles = [m.group() for m in re.finditer(r"\n\nTake note: [^.]*\.\n\n", text)]
        sizes = [len(encode(needle).input_ids) for needle in needles]
        intro, closing = len(encode(config.intro).input_ids), len(encode(config.closing).input_ids)
        haystack = sample.tail_start - intro - closing - sum(sizes)
        starts = needle_starts(sample, tokenizer)
        before = [s - intro - sum(sizes[:j]) for j, s in enumerate(starts)]
        # A needle may join with its neighbours' blanks differently: a few tokens of tolerance.
        expected = [int(haystack * depth) for depth in sorted(sample.depths)]
        np.testing.assert_allclose(before, expected, atol=6)
        depths += sample.depths
    assert 0.05 <= min(depths) < 0.1
    assert 0.9 < max(depths) <= 0.95
    grid = np.linspace(0.05, 0.95, 1000)
    assert all(np.abs(grid - depth).min() < 1e-9 for depth in depths)


def test_lengths_fill_multiples_of_16_and_never_exceed_the_longest(make):
    for longest in (400, 401, 415):
        sampler = make(dataclasses.replace(SMALL, max_length=longest))
        sizes = [sampler.sample(i).tokens.size for i in INDICES]
        assert all(size % 16 == 0 and size <= longest for size in sizes)
        assert max(sizes) == 400


def test_lengths_cover_the_configured_range(make):
    """Haystacks of 60 to 400 tokens in 5 steps, cut where the rest needs the room."""
    config = dataclasses.replace(SMALL, max_length=1400, num_lengths=4)
    sampler = make(config)
    overhead = len(sampler.sample(0, length=1).tokens)
    drawn = {int(x) for x in np.linspace(60, 1400, 4)}
    seen = set()
    for i in range(60):
        haystack = sampler.sample(i).tokens.size - overhead
        nearest = min(drawn, key=lambda length: abs(min(length, 1392 - overhead) - haystack))
        assert abs(min(nearest, 1392 - overhead) - haystack) <= 48
        seen.add(nearest)
    assert seen == drawn


def test_a_given_length_replaces_the_drawn_one_and_nothing_else(make, tokenizer):
    sampler = make(dataclasses.replace(SMALL, max_length=1400))
    short, long = sampler.sample(3, length=100), sampler.sample(3, length=600)
    assert 490 <= long.tokens.size - short.tokens.size <= 510
    assert answers_of(short, tokenizer) == answers_of(long, tokenizer)
    assert short.depths == long.depths
    assert sampler.sample(3, length=10**6).tokens.size == 1392


TAILS = {
    "nato": SMALL,
    "one word": dataclasses.replace(SMALL, passkey_words=1),
    "many passkeys": dataclasses.replace(SMALL, num_passkeys=12, max_length=1500),
    "vocabulary": dataclasses.replace(SMALL, words="vocabulary", passkey_words=3),
    "bare question": dataclasses.replace(SMALL, question="{name}", separator=""),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", TAILS.values(), ids=TAILS.keys())
def test_longest_tail_bounds_every_tail(make, config, request):
    name = "tokenizer" if config.words == "vocabulary" else "coarse_tokenizer"
    sampler = make(
        dataclasses.replace(config, max_length=3000), tokenizer=request.getfixturevalue(name)
    )
    tails = [s.tokens.size - s.tail_start for s in map(sampler.sample, range(200))]
    assert max(tails) <= sampler.longest_tail()
    assert sampler.longest_tail() < 3 * max(tails)  # a bound worth having


def test_vocabulary_words_are_distinct_and_one_token_each(make, tokenizer):
    config = dataclasses.replace(SMALL, words="vocabulary", passkey_words=5)
    sampler = make(config)
    for i in INDICES:
        sample = sampler.sample(i)
        words = [word for answer in answers_of(sample, tokenizer) for word in answer.split()]
        assert len(set(words)) == len(words) == 15
        assert all(stop - start == 5 for start, stop in sample.answers)
        assert not set(words) & set(ORDINALS)


def test_bos_stands_in_front_exactly_where_the_tokenizer_puts_one(
    make, tokenizer, tokenizer_with_bos
):
    assert tokenizer_with_bos("a").input_ids[0] == tokenizer_with_bos.bos_token_id
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    samplers = make(), make(tokenizer=tokenizer_with_bos)
    for i in range(5):
        plain, marked = (sampler.sample(i) for sampler in samplers)
        assert (marked.tokens == 0).tolist() == [True] + [False] * (marked.tokens.size - 1)
        assert not (plain.tokens == 0).any()
        assert marked.tokens.size % 16 == 0
        assert answers_of(plain, tokenizer) == answers_of(marked, tokenizer_with_bos)
        intro = tokenizer(SMALL.intro, add_special_tokens=False).input_ids
        assert marked.tokens[1 : 1 + len(intro)].tolist() == intro


def test_no_room_for_the_passkeys(make):
    config = dataclasses.replace(SMALL, passkey_words=90)
    with pytest.raises(InputError, match="max_length 400 has no room for 3 passkeys of 90 words"):
        make(config)


def test_where_only_some_samples_have_room_none_is_wrong(make, coarse_tokenizer):
    """Words differ in tokens, so near the limit a sample may not fit: say so, never cut."""
    fitting = refused = 0
    for longest in range(64, 256, 16):
        config = dataclasses.replace(BARE, max_length=longest)
        try:
            sampler = make(config, tokenizer=coarse_tokenizer)
        except InputError:
            continue
        for i in INDICES:
            try:
                sample = sampler.sample(i)
            except InputError:
                refused += 1
            else:
                assert sample.tokens.size <= longest
                assert sample.tokens.size % 16 == 0
                fitting += 1
    assert fitting > 0
    assert refused > 0


def test_too_few_words_in_the_vocabulary(make):
    config = dataclasses.replace(SMALL, words="vocabulary", passkey_words=30)
    with pytest.raises(InputError, match=r"3 passkeys of 30 distinct words need 90 words; .* \d+"):
        make(config)


DIGITS = PasskeyConfig(words="digits", num_passkeys=3, min_length=60, max_length=400)


def test_passkeys_of_digits_are_numbers_of_five_in_sentences_of_their_own(make, tokenizer):
    sampler = make(DIGITS)
    for i in INDICES:
        sample = sampler.sample(i)
        answers = answers_of(sample, tokenizer)
        assert len(set(answers)) == 3
        context = tokenizer.decode(sample.tokens[: sample.tail_start])
        tail = tokenizer.decode(sample.tokens[sample.tail_start :])
        for answer in answers:
            assert re.fullmatch(r" [1-9]\d{4}", answer)
            (name,) = re.findall(rf"The (\w+) pass key is{answer}\. Remember it\.", context)
            assert f"Remember it.{answer} is the {name} pass key." in context
            assert f"What is the {name} pass key? The {name} pass key is{answer}." in tail
        assert sample.tokens.size <= 400
        assert sample.tokens.size - sample.tail_start <= sampler.longest_tail()


def test_what_was_chosen_stays_beside_digits():
    config = PasskeyConfig(words="digits", passkey_words=2, question="And {name}?")
    assert (config.passkey_words, config.question) == (2, "And {name}?")
    assert config.needle.startswith("\n\nThe {name} pass key is{passkey}. Remember it.")
    assert dataclasses.replace(config) == config
    assert PasskeyConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize("text", [{"vocab_size": 280}, {"vocab_size": 2000}])
def test_a_word_of_digits_takes_no_more_tokens_than_is_thought(tmp_path, text):
    tokenizer = AutoTokenizer.from_pretrained(models.write_tokenizer(tmp_path, **text))

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    words = word_list("digits", tokenizer)
    assert (len(words), words[0], words[-1]) == (90_000, "10000", "99999")
    fewest, most = tokens_per_word("digits", words, encode)
    assert all(fewest <= len(encode(" " + word)) <= most for word in words[::997])
