"""The texts of tokens in logprobs, joined, are the text."""

import pytest

from duo_jax.engine.request import Request, TokenLogprob
from duo_jax.server.text_logprobs import Speller, joined


def speller(served, *, echo=False, **settings):
    request = Request(prompt=(0, 500), max_tokens=8, logprobs=0, **settings)
    return Speller(served.service, request, echo=echo)


def logprobs(tokens):
    return [TokenLogprob(token=token, logprob=-1.0, top=()) for token in tokens]


def test_a_character_of_several_tokens_stands_with_the_last(served, model):
    tokens = model.tokenizer(" 你é", add_special_tokens=False)["input_ids"]
    spell = speller(served)
    parts = [spell.written([token], logprobs([token]), last=False) for token in tokens]
    found = joined(parts)
    assert [text for text in found.tokens if text] == [" ", "你", "é"]
    assert len(found.tokens) == len(tokens) > 3
    assert found.text_offset[0] == 0
    assert found.text_offset[-1] == 2


def test_a_character_that_is_cut_off_stands_with_the_last_token(served, model):
    tokens = model.tokenizer("a你", add_special_tokens=False)["input_ids"][:-1]
    found = speller(served).written(tokens, logprobs(tokens), last=True)
    assert "".join(found.tokens) == model.tokenizer.decode(tokens) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("settings", "text"), [({}, ""), ({"ignore_eos": True}, "<|end|>")])
def test_a_token_that_ends_the_text_is_no_part_of_it(served, settings, text):
    spell = speller(served, skip_special_tokens=False, **settings)
    found = spell.written([500, 1], logprobs([500, 1]), last=True)
    assert found.tokens == ["gument", text]
    assert list(found.top_logprobs[1]) == ["<|end|>"]


def test_an_answer_goes_on_where_an_echoed_prompt_ends(served):
    spell = speller(served, echo=True)
    prompt = spell.prompt([0, 500], [None, *logprobs([500])], last=False)
    answer = spell.written([500], logprobs([500]), last=True)
    assert (prompt.tokens, prompt.text_offset) == (["", "gument"], [0, 0])
    assert (answer.tokens, answer.text_offset) == (["gument"], [6])


def test_a_character_that_a_prompt_alone_cuts_off_stands_with_its_last_token(served, model):
    tokens = model.tokenizer("a你", add_special_tokens=False)["input_ids"][:-1]
    found = speller(served, echo=True).prompt(tokens, logprobs(tokens), last=True)
    assert "".join(found.tokens) == model.tokenizer.decode(tokens) == "a\N{REPLACEMENT CHARACTER}"
