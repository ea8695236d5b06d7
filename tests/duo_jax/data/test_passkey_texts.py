"""The text in which passkeys are hidden: which one is taken, when it is too short; plain text."""

import dataclasses

import numpy as np
import pytest

from duo_jax.data.documents import load_documents
from duo_jax.data.passkeys import PasskeySampler, TooShortError, sampler_of_first
from duo_jax.errors import InputError
from tests.passkeys import BARE, INDICES, SMALL, same


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


@pytest.mark.parametrize(
    ("passkeys", "options"),
    [(1, {}), (1, {"chat": ("[user] ", " [assistant] ")}), (2, {"fewest": 1})],
    ids=["plain", "chats", "one or two passkeys"],
)
def test_text_just_long_enough_serves_every_sample(make, coarse_tokenizer, passkeys, options):
    config = dataclasses.replace(BARE, num_passkeys=passkeys, passkey_words=1, max_length=128)
    words = "night vault sea " * 100
    low, high = 0, len(words)
    while high - low > 1:  # the shortest text that is accepted
        middle = (low + high) // 2
        try:
            make(config, text=[words[:middle]], tokenizer=coarse_tokenizer, **options)
            high = middle
        except InputError:
            low = middle
    sampler = make(config, text=[words[:high]], tokenizer=coarse_tokenizer, **options)
    samples = [sampler.sample(i, length=128) for i in range(100)]
    assert {sample.tokens.size for sample in samples} <= (
        {112, 128} if "chat" in options else {128}
    )
    assert len({sample.tail_start for sample in samples}) > 1
    assert {len(sample.answers) for sample in samples} == set(range(1, passkeys + 1))


def test_plain_text_is_a_stretch_of_the_text_as_long_as_the_sample(make, tokenizer_with_bos):
    text = load_documents(())[:12]
    sampler, again = (make(tokenizer=tokenizer_with_bos) for _ in range(2))
    everything = tokenizer_with_bos("\n\n".join(text), add_special_tokens=False).input_ids
    starts = set()
    for i in INDICES:
        plain = sampler.plain_text(i)
        assert (plain.tail_start, plain.answers, plain.depths) == (0, (), ())
        assert plain.tokens.size == sampler.sample(i).tokens.size
        assert same(plain, again.plain_text(i))
        assert plain.tokens[0] == tokenizer_with_bos.bos_token_id
        stretch = tokenizer_with_bos.decode(plain.tokens[1:])
        assert stretch in tokenizer_with_bos.decode(everything) + "\n\n"
        starts.add(stretch[:20])
    assert len(starts) > len(INDICES) / 2
    other_seed = make(tokenizer=tokenizer_with_bos, seed=1).plain_text(0)
    assert not np.array_equal(other_seed.tokens, sampler.plain_text(0).tokens)


def test_the_last_tokens_of_plain_text_may_be_what_is_asked(make):
    sampler = make()
    whole = sampler.plain_text(0)
    size = whole.tokens.size
    for tail, start in ((5, size - 5), (size + 3, 1)):  # nothing is before the first token
        ended = sampler.plain_text(0, tail=tail)
        np.testing.assert_array_equal(ended.tokens, whole.tokens)
        assert (ended.tail_start, ended.answers) == (start, ((start, size),))


def test_plain_text_shorter_than_a_sample_is_all_of_it(make, tokenizer):
    config = dataclasses.replace(SMALL, min_length=400)
    words = "night vault sea " * 40
    sampler = make(config, text=[words])
    size = len(tokenizer(words + "\n\n").input_ids)
    assert size < sampler.sample(0).tokens.size
    assert sampler.plain_text(0).tokens.tolist() == tokenizer(words + "\n\n").input_ids
