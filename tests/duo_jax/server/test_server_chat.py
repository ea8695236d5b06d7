"""/v1/chat/completions, asked by OpenAI's own client."""

import json

import openai
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Passkey one?"}]
RENDERED = "<|begin|>system: Be brief.\nuser: Passkey one?\nassistant:"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def ask(client):
    def call(**settings):
        settings = {"model": "demo", "messages": MESSAGES, "max_tokens": 8} | settings
        own = {"continue_final_message", "add_generation_prompt", "chat_template_kwargs", "top_k"}
        extra = {name: settings.pop(name) for name in own & settings.keys()}
        return client.chat.completions.create(**settings, extra_body=extra)

    return call


@pytest.fixture(scope="module")
def rendered(http):
    """Return what a chat looks like to the model."""

    def call(**settings):
        found = http.post("/tokenize", json={"messages": MESSAGES} | settings).json()
        return http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]

    return call


def content(answer):
    return answer.choices[0].message.content


def test_an_answer_is_that_of_the_rendered_chat(ask, client, model):
    tokens = model.tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    answer = ask()
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(tokens)
    assert content(answer) == _continued(client, RENDERED)


def test_a_chat_is_written_out_by_the_template(rendered):
    assert rendered() == RENDERED
    assert rendered(add_generation_prompt=False) == RENDERED.removesuffix("assistant:")


def test_developers_speak_as_the_system(rendered):
    assert rendered(messages=[{**MESSAGES[0], "role": "developer"}, MESSAGES[1]]) == RENDERED


def test_content_may_come_in_parts(rendered):
    parts = [{"type": "text", "text": "Passkey"}, {"type": "text", "text": "one?"}]
    found = rendered(messages=[MESSAGES[0], {"role": "user", "content": parts}])
    assert found == RENDERED.replace("Passkey one", "Passkey\none")


def test_pictures_are_refused(ask):
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        ask(messages=[{"role": "user", "content": parts}])


def test_tools_reach_the_template(rendered):
    assert rendered(tools=[TOOL]).startswith(
        '<|begin|>Tools: [{"type": "function", "function": {"name"'
    )


def test_tools_that_nobody_may_call_do_not(ask):
    with_tools = ask(tools=[TOOL], tool_choice="none").usage.prompt_tokens
    assert with_tools == ask().usage.prompt_tokens
    assert ask(tools=[TOOL]).usage.prompt_tokens > with_tools


def test_a_tool_that_must_be_called_is_refused(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(tools=[TOOL], tool_choice="required")
    assert error.value.param == "tool_choice"


def test_calls_of_tools_and_their_results_may_be_in_a_chat(rendered):
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
    found = rendered(
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "nothing"},
        ]
    )
    assert (
        found
        == RENDERED.removesuffix("assistant:") + 'assistant: {"a": 1}\ntool: nothing\nassistant:'
    )


def test_a_message_of_the_assistant_can_be_continued(ask, client, rendered):
    messages = [*MESSAGES, {"role": "assistant", "content": "The first is"}]
    text = RENDERED + " The first is"
    assert rendered(messages=messages, continue_final_message=True) == text
    found = content(ask(messages=messages, continue_final_message=True))
    assert found == _continued(client, text)


def _continued(client, text):
    tokens = client.post("/../tokenize", body={"prompt": text, "add_special_tokens": False},
                         cast_to=object)["tokens"]  # fmt: skip
    answer = client.completions.create(model="demo", prompt=tokens, max_tokens=8)
    return answer.choices[0].text


def test_it_cannot_be_continued_and_answered(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(continue_final_message=True, add_generation_prompt=True)
    assert error.value.param == "add_generation_prompt"


def test_max_completion_tokens_is_the_newer_name(ask):
    assert ask(max_completion_tokens=3).usage.completion_tokens == 3


def test_an_answer_may_take_all_the_room_there_is(client, served):
    long = [{"role": "user", "content": " us" * 400}]
    answer = client.chat.completions.create(model="demo", messages=long)
    total = answer.usage.total_tokens
    ended = answer.choices[0].finish_reason
    assert (total == served.engine.max_len) == (ended == "length")


def test_logprobs_are_of_all_tokens_and_their_bytes_are_the_text(ask):
    answer = ask(logprobs=True, top_logprobs=3)
    found = answer.choices[0].logprobs.content
    assert len(found) == answer.usage.completion_tokens
    assert bytes(b for one in found for b in one.bytes).decode() == content(answer)
    for one in found:
        ranked = [top.logprob for top in one.top_logprobs]
        assert len(ranked) == 3
        assert ranked == sorted(ranked, reverse=True)
        assert one.logprob == ranked[0]


def test_no_logprobs_are_told_where_none_are_asked_for(ask):
    assert ask().choices[0].logprobs is None


def test_top_logprobs_need_logprobs(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(top_logprobs=2)
    assert error.value.param == "top_logprobs"


def test_more_than_twenty_top_logprobs_are_refused(ask):
    with pytest.raises(openai.BadRequestError):
        ask(logprobs=True, top_logprobs=21)
    assert content(ask())


def test_several_answers_have_an_index_each(ask):
    answer = ask(n=2, temperature=1.5, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len({choice.message.content for choice in answer.choices}) == 2


def test_a_json_object_is_begun(ask):
    assert content(ask(response_format={"type": "json_object"})).startswith("{")


def test_an_answer_follows_a_json_schema(ask):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    answer = ask(response_format=form, max_tokens=32)
    assert type(json.loads(content(answer))["ok"]) is bool
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "multipleOf": "x"},
        {"not": {"type": "string"}},
        {"$ref": "#"},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    ],
    ids=["a number that is none", "not", "itself", "3,000 properties"],
)
def test_a_schema_that_cannot_be_followed_is_refused(ask, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.UnprocessableEntityError) as error:
        ask(response_format=form)
    assert error.value.code == "unsupported_schema"
    assert "compute_time" not in str(error.value)


def test_a_field_that_a_message_lacks_is_named(ask):
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.role: Field required") as error:
        ask(messages=[{"role": "user", "content": "a"}, {"content": "b"}])
    assert error.value.param == "messages"


def test_what_the_template_refuses_is_refused(ask):
    with pytest.raises(openai.UnprocessableEntityError, match="nobody cannot speak"):
        ask(messages=[{"role": "nobody", "content": "?"}])


@pytest.mark.parametrize(
    "settings",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "Hi"}]},
        {"chat_template_kwargs": {"messages": []}},
        {"functions": [{"name": "f"}]},
        {"modalities": ["audio"]},
        {"response_format": {"type": "json_schema"}},
        {"max_tokens": 5000},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(ask, settings):
    with pytest.raises(openai.BadRequestError):
        ask(**settings)
