"""Calibration samples: pure functions of (seed, index), and exactly what they claim to be."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.data.documents import load_documents
from duo_jax.data.passkey_templates import NATO, ORDINALS, tokens_per_word, word_list
from duo_jax.data.passkeys import (
    PasskeyConfig,
    PasskeySampler,
    TooShortError,
    sampler_of_first,
)
from duo_jax.errors import InputError
from tests import models, sentencepiece_style

SMALL = PasskeyConfig(num_passkeys=3, passkey_words=4, min_length=60, max_length=400, num_lengths=5)
INDICES = range(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Return a function that makes fresh samplers."""
    documents = load_documents(())[:12]

    def make(config=SMALL, *, seed=0, text=documents, tokenizer=tokenizer, **others):
        return PasskeySampler(config, tokenizer, text, seed=seed, **others)

    return make


# Nothing but passkeys, so that their lengths in tokens matter most.
BARE = dataclasses.replace(
    SMALL, min_length=1, intro="", needle="{passkey}\n", closing="", question="", separator="\n"
)


@pytest.fixture(scope="module")
def coarse_tokenizer(tmp_path_factory):
    """Return a tokenizer that spells most words: from two to eight tokens each."""
    folder = models.write_tokenizer(tmp_path_factory.mktemp("coarse"), vocab_size=280)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {len(tokenizer(" " + word).input_ids) for word in NATO}
    assert max(sizes) - min(sizes) >= 3
    return tokenizer


def same(a, b) -> bool:
    return (
        np.array_equal(a.tokens, b.tokens)
        and (a.tail_start, a.answers, a.depths) == (b.tail_start, b.answers, b.depths)
    )  # fmt: skip


def answers_of(sample, tokenizer) -> list[str]:
    return [tokenizer.decode(sample.tokens[start:stop]) for start, stop in sample.answers]


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


@pytest.fixture(scope="module")
def tokenizer_with_bos(folder, tmp_path_factory):
    """Return the same tokenizer with the post-processor of Llama, which puts bos in front."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, pair],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    target = tmp_path_factory.mktemp("with-bos")
    (target / "tokenizer.json").write_text(json.dumps(raw))
    (target / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    return AutoTokenizer.from_pretrained(target)


def test_bos_stands_in_front_exactly_where_the_tokenizer_puts_one(
    make, tokenizer, tokenizer_with_bos
):
    assert tokenizer_with_bos("a").input_ids[0] == tokenizer_with_bos.bos_token_id
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    for i in range(5):
        plain = make().sample(i)
        marked = make(tokenizer=tokenizer_with_bos).sample(i)
        assert (marked.tokens == 0).tolist() == [True] + [False] * (marked.tokens.size - 1)
        assert not (plain.tokens == 0).any()
        assert marked.tokens.size % 16 == 0
        assert answers_of(plain, tokenizer) == answers_of(marked, tokenizer_with_bos)
        intro = tokenizer(SMALL.intro, add_special_tokens=False).input_ids
        assert marked.tokens[1 : 1 + len(intro)].tolist() == intro


CHANGES = {
    "num_passkeys": 2,
    "passkey_words": 3,
    "words": "vocabulary",
    "min_length": 100,
    "max_length": 384,
    "num_lengths": 2,
    "intro": "Read this.\n",
    "needle": "\n{name} key:{passkey}\n",
    "closing": "\nThe end.\n",
    "question": "{name} key:",
    "separator": "\n",
}


def test_every_field_is_listed():
    assert sorted(CHANGES) == sorted(field.name for field in dataclasses.fields(PasskeyConfig))


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_samples(make, field):
    changed = dataclasses.replace(SMALL, **{field: CHANGES[field]})
    pairs = zip(map(make().sample, range(8)), map(make(changed).sample, range(8)), strict=True)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in pairs)


def test_every_second_sample_is_a_chat(make, tokenizer, tokenizer_with_bos):
    """The user's message holds all before the questions, and no token is lost or written twice."""
    plain, chats = make(), make(chat=("[user] ", " [assistant] "))
    assert same(chats.sample(2), plain.sample(2))
    sample = chats.sample(3)
    before, tail = (
        tokenizer.decode(part)
        for part in (sample.tokens[: sample.tail_start], sample.tokens[sample.tail_start :])
    )
    assert before.startswith("[user] " + SMALL.intro)
    assert before.endswith(SMALL.closing + " [assistant] ")
    assert tail == tokenizer.decode(plain.sample(3).tokens[plain.sample(3).tail_start :])
    assert sample.tokens.size % 16 == 0
    bos = tokenizer_with_bos.bos_token
    for opening in ("[user] ", bos + "[user] "):  # templates write it themselves, or do not
        made = make(tokenizer=tokenizer_with_bos, chat=(opening, "[assistant] "))
        assert made.sample(1).tokens.tolist().count(tokenizer_with_bos.bos_token_id) == 1


def test_templates_stand_where_they_belong(make, tokenizer):
    marks = {
        "intro": "<intro>",
        "needle": "<needle {name}:{passkey}>",
        "closing": "<closing>",
        "question": "<question {name}:",
        "separator": ">",
    }
    sample = make(dataclasses.replace(SMALL, **marks)).sample(0)
    text = tokenizer.decode(sample.tokens)
    found = re.findall(r"<(intro|needle|closing|question)", text)
    assert found == ["intro"] + ["needle"] * 3 + ["closing"] + ["question"] * 3
    for answer in answers_of(sample, tokenizer):
        assert len(re.findall(rf"<needle (\w+):{answer}>", text)) == 1
        assert len(re.findall(rf"<question (\w+):{answer}>", text)) == 1


BAD_VALUES = {
    "no passkeys": ({"num_passkeys": 0}, "num_passkeys 0 is not in 1 to 20"),
    "more passkeys than ordinals": ({"num_passkeys": 21}, "num_passkeys 21"),
    "no words": ({"passkey_words": 0}, "passkey_words 0 is not a whole number from 1"),
    "no shortest length": ({"min_length": 0}, "min_length 0 is not a whole number from 1"),
    "lengths the wrong way round": ({"min_length": 401}, "lengths 401 to 400"),
    "no lengths": ({"num_lengths": 0}, "num_lengths 0 is not a whole number from 1"),
    "needle without passkey": ({"needle": "{name}"}, "the needle must hold {passkey}"),
    "unknown name in the needle": ({"needle": "{who}{passkey}"}, "needle"),
    "unknown name in the question": ({"question": "{who}?"}, "question"),
    "single brace in the question": ({"question": "what{?"}, "question"),
    "positional name in the question": ({"question": "{} {0}?"}, "question"),
}


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_one_clear_line(change, message):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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


def test_text_too_short_names_the_two_ways_out(make):
    with pytest.raises(InputError, match=r"the text has \d+ tokens.*--text, or lower --max-length"):
        make(text=["Too short a text for that."])


def test_the_first_text_that_is_long_enough_is_taken_and_named(tokenizer):
    texts = {"short": ["Too short."], "long": load_documents(())[:12], "longer": load_documents(())}
    sampler, name = sampler_of_first(texts, SMALL, tokenizer, seed=0, stream=2)
    assert name == "long"
    expected = PasskeySampler(SMALL, tokenizer, texts["long"], seed=0, stream=2)
    assert same(sampler.sample(3), expected.sample(3))
    with pytest.raises(TooShortError):
        sampler_of_first({"a": [], "b": ["Too short."]}, SMALL, tokenizer, seed=0, stream=2)


def test_only_a_text_that_is_too_short_is_passed_over(tokenizer):
    """Another error would be the same for every text, or hide what is wrong with the first."""

    class Broken(list):
        def __iter__(self):
            raise InputError("the first text cannot be read")

    texts = {"broken": Broken(), "long": load_documents(())[:12]}
    with pytest.raises(InputError, match="the first text cannot be read"):
        sampler_of_first(texts, SMALL, tokenizer, seed=0, stream=2)


def test_text_just_long_enough_serves_every_sample(make, coarse_tokenizer):
    config = dataclasses.replace(BARE, num_passkeys=1, passkey_words=1, max_length=128)
    words = "night vault sea " * 100
    low, high = 0, len(words)
    while high - low > 1:  # the shortest text that is accepted
        middle = (low + high) // 2
        try:
            make(config, text=[words[:middle]], tokenizer=coarse_tokenizer)
            high = middle
        except InputError:
            low = middle
    sampler = make(config, text=[words[:high]], tokenizer=coarse_tokenizer)
    samples = [sampler.sample(i, length=128) for i in range(100)]
    assert {sample.tokens.size for sample in samples} == {128}
    assert len({sample.tail_start for sample in samples}) > 1


def test_too_few_words_in_the_vocabulary(make):
    config = dataclasses.replace(SMALL, words="vocabulary", passkey_words=30)
    with pytest.raises(InputError, match=r"3 passkeys of 30 distinct words need 90 words; .* \d+"):
        make(config)


def test_plain_text_is_a_stretch_of_the_text_as_long_as_the_sample(make, tokenizer_with_bos):
    text = load_documents(())[:12]
    sampler = make(tokenizer=tokenizer_with_bos)
    everything = tokenizer_with_bos("\n\n".join(text), add_special_tokens=False).input_ids
    starts = set()
    for i in INDICES:
        plain = sampler.plain_text(i)
        assert (plain.tail_start, plain.answers, plain.depths) == (0, (), ())
        assert plain.tokens.size == sampler.sample(i).tokens.size
        assert same(plain, make(tokenizer=tokenizer_with_bos).plain_text(i))
        assert plain.tokens[0] == tokenizer_with_bos.bos_token_id
        stretch = tokenizer_with_bos.decode(plain.tokens[1:])
        assert stretch in tokenizer_with_bos.decode(everything) + "\n\n"
        starts.add(stretch[:20])
    assert len(starts) > len(INDICES) / 2
    other_seed = make(tokenizer=tokenizer_with_bos, seed=1).plain_text(0)
    assert not np.array_equal(other_seed.tokens, sampler.plain_text(0).tokens)


def test_plain_text_shorter_than_a_sample_is_all_of_it(make, tokenizer):
    config = dataclasses.replace(SMALL, min_length=400)
    words = "night vault sea " * 40
    sampler = make(config, text=[words])
    size = len(tokenizer(words + "\n\n").input_ids)
    assert size < sampler.sample(0).tokens.size
    assert sampler.plain_text(0).tokens.tolist() == tokenizer(words + "\n\n").input_ids


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
        assert sample.tokens.size - sample.tail_start <= make(DIGITS).longest_tail()


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
