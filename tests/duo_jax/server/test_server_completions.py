"""/v1/completions, asked by OpenAI's own client."""

import json

import openai
import pytest

PROMPT = "Passkey first function arguments.\nPasskey first"
EOS = 1


@pytest.fixture(scope="module")
def ask(client):
    """Return a call that continues the prompt by eight tokens, unless told otherwise."""

    def call(**settings):
        settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 8} | settings
        own = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids",
               "skip_special_tokens", "response_format"} & settings.keys()  # fmt: skip
        extra = {name: settings.pop(name) for name in own}
        return client.completions.create(**settings, extra_body=extra)

    return call


@pytest.fixture(scope="module")
def text(ask):
    def call(**settings):
        return ask(**settings).choices[0].text

    return call


@pytest.fixture(scope="module")
def greedy(text):
    return text()


def tokens(model, text):
    return model.tokenization.encode(text)


def test_a_text_is_continued_as_in_python(model, greedy):
    assert [greedy] == model.generate([PROMPT], max_new_tokens=8)


def test_an_answer_names_what_it_is(ask, served):
    answer = ask()
    assert answer.object == "text_completion"
    assert answer.model == "demo"
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint == served.service.fingerprint


def test_usage_is_exact(ask, model):
    usage = ask(max_tokens=5).usage
    assert usage.prompt_tokens == len(tokens(model, PROMPT))
    assert usage.completion_tokens == 5
    assert usage.total_tokens == usage.prompt_tokens + 5


def test_sixteen_tokens_are_written_by_default(client):
    answer = client.completions.create(model="demo", prompt=PROMPT)
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_several_prompts_are_answered_in_their_order(ask, text):
    prompts = [PROMPT, "The class", "Return"]
    answer = ask(prompt=prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [text(prompt=p) for p in prompts]


def test_tokens_are_a_prompt_too(text, greedy, model):
    assert text(prompt=tokens(model, PROMPT)) == greedy


def test_so_are_lists_of_tokens(ask, greedy, model):
    answer = ask(prompt=[tokens(model, PROMPT), tokens(model, "Return")])
    assert answer.choices[0].text == greedy
    both = len(tokens(model, PROMPT)) + len(tokens(model, "Return"))
    assert answer.usage.prompt_tokens == both


def test_n_answers_have_an_index_each_and_their_prompt_counts_once(ask, model):
    answer = ask(n=3, temperature=1.5, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len(tokens(model, PROMPT))
    assert answer.usage.completion_tokens == 24


def test_two_prompts_have_n_answers_each(ask, text):
    answer = ask(prompt=[PROMPT, "Return"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices[2:]] == [text(prompt="Return")] * 2


def test_a_seed_repeats_texts_that_differ_from_each_other(ask):
    settings = {"n": 3, "temperature": 1.5, "seed": 7}
    first, second = ([c.text for c in ask(**settings).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_without_a_seed_no_two_texts_are_alike(text):
    assert text(temperature=2.0) != text(temperature=2.0)


def test_seeds_may_be_negative(text):
    assert text(temperature=2.0, seed=-1) == text(temperature=2.0, seed=2**32 - 1)


@pytest.mark.parametrize(
    "only", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0}], ids=str
)
def test_what_leaves_one_token_is_greedy(text, greedy, only):
    assert text(**{"temperature": 2.0} | only) == greedy


def test_top_k_may_be_minus_one_as_in_vllm(text):
    settings = {"temperature": 2.0, "seed": 3}
    assert text(**settings, top_k=-1) == text(**settings)


def test_penalties_make_a_text_repeat_itself_less(ask):
    def distinct(**settings):
        found = ask(prompt="us us us us", max_tokens=24, logprobs=0, **settings)
        return len(set(found.choices[0].logprobs.tokens))

    assert distinct(frequency_penalty=2) > distinct()
    assert distinct(presence_penalty=2) > distinct()
    assert distinct(repetition_penalty=2.0) > distinct()


def test_a_bias_forces_a_token_and_forbids_one(text, model):
    [token] = tokens(model, "the")[1:]
    assert text(logit_bias={str(token): 100}, max_tokens=3) == "thethethe"
    first = tokens(model, text(max_tokens=1))[1]
    assert text(max_tokens=1, logit_bias={str(first): -100}) != text(max_tokens=1)


def test_an_end_of_text_token_ends_the_text_and_counts(ask):
    answer = ask(logit_bias={str(EOS): 100})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == ""
    assert answer.usage.completion_tokens == 1


def test_it_can_be_ignored_and_shown(ask, text):
    settings = {"logit_bias": {str(EOS): 100}, "ignore_eos": True, "max_tokens": 2}
    answer = ask(**settings)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == ""
    assert text(**settings, skip_special_tokens=False) == "<|end|><|end|>"


@pytest.mark.parametrize("several", [False, True])
def test_a_text_ends_before_a_stop_string(ask, greedy, several):
    stop = greedy[4:7]
    answer = ask(stop=["never", stop] if several else stop)
    assert answer.choices[0].text == greedy[: greedy.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_text_ends_with_a_stop_token(ask, greedy, model):
    written = ask(logprobs=0).choices[0].logprobs.tokens
    answer = ask(stop_token_ids=[_id(model, written[2])])
    assert answer.choices[0].finish_reason == "stop"
    assert greedy.startswith(answer.choices[0].text)
    assert answer.choices[0].text == "".join(written[: written.index(written[2])])


def _id(model, text):
    """Return the token that spells a text."""
    [found] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_echo_puts_the_prompt_first(text, greedy):
    assert text(echo=True) == PROMPT + greedy


@pytest.mark.parametrize("prompt", [PROMPT, "é und 你好 🎉 e"])
def test_logprobs_with_echo_joined_are_the_text(ask, prompt):
    choice = ask(prompt=prompt, echo=True, logprobs=3).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    places = zip(found.text_offset, found.tokens, strict=True)
    assert all(choice.text[at:].startswith(token) for at, token in places)
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])


def test_logprobs_joined_are_the_answer(ask, greedy):
    assert "".join(ask(logprobs=1).choices[0].logprobs.tokens) == greedy


def test_top_logprobs_hold_the_token_and_its_rivals(ask):
    found = ask(logprobs=4).choices[0].logprobs
    entries = zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    for token, logprob, top in entries:
        assert top[token] == logprob == max(top.values())
        assert len(top) == 4


def test_no_rivals_are_told_where_none_are_asked_for(ask):
    found = ask(logprobs=0).choices[0].logprobs
    assert [list(top) for top in found.top_logprobs] == [[token] for token in found.tokens]


def test_a_text_can_be_scored_alone(ask, model):
    answer = ask(max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.token_logprobs) == len(tokens(model, PROMPT))
    assert answer.usage.completion_tokens == 0


def test_scores_do_not_depend_on_what_was_read_before(ask):
    ask()  # its prompt is kept
    first = ask(max_tokens=0, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
    ask(max_tokens=64)
    assert ask(max_tokens=0, echo=True, logprobs=1).choices[0].logprobs.token_logprobs == first


def test_more_than_twenty_logprobs_are_refused_and_the_server_lives(ask, greedy):
    with pytest.raises(openai.BadRequestError) as error:
        ask(logprobs=21)
    assert error.value.param == "logprobs"
    assert ask(logprobs=20).choices[0].text == greedy


def test_a_prompt_that_was_read_is_not_read_again(ask, model):
    long = "Passkey fifth interpreter, and so on. " * 20
    first, second = ask(prompt=long), ask(prompt=long)
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    count = len(tokens(model, long))
    assert count / 2 < second.usage.prompt_tokens_details.cached_tokens < count
    assert second.usage.prompt_tokens == count


def test_what_leaves_no_room_is_refused(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(max_tokens=510)
    assert error.value.code == "context_length_exceeded"


WRONG = {
    "a suffix": {"suffix": "end"},
    "the best of many": {"best_of": 3},
    "no prompt": {"prompt": ""},
    "a token that is none": {"prompt": [[5, 1024]]},
    "too many prompts": {"prompt": [PROMPT] * 65},
    "an empty stop string": {"stop": ""},
    "a bias of no token": {"logit_bias": {"1024": 1}},
    "a bias of a word": {"logit_bias": {"the": 1}},
    "a stop token that is none": {"stop_token_ids": [1024]},
    "a negative temperature": {"temperature": -1},
    "a temperature as text": {"temperature": "1"},
    "half of a character": {"prompt": "\ud800"},
    "JSON that goes on": {"ignore_eos": True, "response_format": {"type": "json_object"}},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_in_one_line(http, what):
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 4} | WRONG[what]
    answer = http.post("/v1/completions", content=json.dumps(asked),
                       headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


UNPARSED = {  # body, its kind, what is wrong
    "no JSON": (b'{"prompt": ', "application/json", "the body is not JSON: Expecting value"),
    "another kind": (b'{"prompt": "a"}', "text/plain", "application/json (it is text/plain)"),
    "no kind": (b'{"prompt": "a"}', None, "application/json (it is none)"),
    "bytes of no text": (b'{"prompt": "\xff"}', "application/json", "the body is not UTF-8 text"),
    "too deep": (b"[" * 100_000, "application/json", "the body is nested too deeply"),
}


@pytest.mark.parametrize("what", UNPARSED)
def test_a_body_that_cannot_be_read_is_told_from_others(http, what):
    content, kind, message = UNPARSED[what]
    headers = {"content-type": kind} if kind else {}
    answer = http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


SCHEMA = {
    "type": "object",
    "properties": {"found": {"type": "boolean"}, "which": {"enum": ["first", "third"]}},
    "required": ["found", "which"],
    "additionalProperties": False,
}


def test_a_text_follows_a_json_schema(ask):
    form = {"type": "json_schema", "json_schema": {"name": "key", "schema": SCHEMA}}
    answer = ask(response_format=form, max_tokens=64, temperature=1.5, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].text)
    assert set(found) == {"found", "which"}
    assert found["which"] in ("first", "third")


def test_the_filters_of_parallel_texts_are_their_own(ask):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    answer = ask(response_format=form, max_tokens=64, temperature=2.0, seed=2, n=4)
    assert all(set(json.loads(c.text)) == {"found", "which"} for c in answer.choices)
