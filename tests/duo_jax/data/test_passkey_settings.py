"""Settings of passkey samples: each one matters, and impossible ones are one clear line."""

import dataclasses
import re

import numpy as np
import pytest

from duo_jax.data.passkeys import PasskeyConfig
from duo_jax.errors import InputError
from tests.passkeys import SMALL, answers_of, same

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


def test_samples_draw_from_the_fewest_passkeys_to_the_most(make, tokenizer):
    """Chats and plain samples alike, and each number is asked for as often as another."""
    several, three = make(fewest=1, chat=("[user] ", " [assistant] ")), make()
    drawn = [several.sample(i) for i in range(120)]
    for samples in (drawn[::2], drawn[1::2]):
        counts = np.bincount([len(sample.answers) for sample in samples], minlength=4)
        assert counts[0] == 0
        assert counts[1:].min() >= 10
    for sample in drawn[:6]:
        context = tokenizer.decode(sample.tokens[: sample.tail_start])
        assert context.count("passkey to the vault:") == len(sample.answers)
        assert all(answer in context for answer in answers_of(sample, tokenizer))
        assert len(sample.depths) == len(sample.answers)
        assert sample.tokens.size % 16 == 0
    assert all(same(make(fewest=3).sample(i), three.sample(i)) for i in range(6))


@pytest.mark.parametrize("fewest", [0, 4])
def test_more_than_the_most_or_none_are_refused(make, fewest):
    with pytest.raises(InputError, match=f"min_passkeys {fewest} is not in 1 to num_passkeys, 3"):
        make(fewest=fewest)


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
