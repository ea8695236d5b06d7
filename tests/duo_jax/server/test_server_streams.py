"""Streams: their pieces are the whole, in order, whoever else is answered."""

import asyncio
import json

import openai
import pytest

PROMPT = "Passkey first function arguments.\nPasskey first"
MESSAGES = [{"role": "user", "content": PROMPT}]
TEXTS = {
    "a text": {},
    "several texts": {"n": 3, "temperature": 1.2, "seed": 5},
    "several prompts": {"prompt": [PROMPT, "Return"]},
    "the prompt too": {"echo": True},
    "its log-probabilities": {"echo": True, "logprobs": 2},
    "log-probabilities": {"logprobs": 2},
    "up to a stop string": {"stop": "arg"},
    "characters of several tokens": {"prompt": "é 你好 🎉 é 你好", "temperature": 2.0, "seed": 4},
}
CHATS = {
    "an answer": {},
    "several answers": {"n": 2, "temperature": 1.2, "seed": 5},
    "an answer's log-probabilities": {"logprobs": True, "top_logprobs": 2},
}


def asked(settings):
    return {"model": "demo", "prompt": PROMPT, "max_tokens": 12} | settings


def asked_chat(settings):
    return {"model": "demo", "messages": MESSAGES, "max_tokens": 12} | settings


def pieces(stream, piece):
    """Return the text of every index, and check that it ends once, with its last chunk."""
    texts, ended = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in ended
            texts[choice.index] = texts.get(choice.index, "") + (piece(choice) or "")
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
    assert texts.keys() == ended.keys()
    return texts, ended


@pytest.mark.parametrize("what", TEXTS)
def test_streamed_and_whole_are_equal(client, what):
    settings = asked(TEXTS[what])
    whole = client.completions.create(**settings)
    texts, ended = pieces(client.completions.create(**settings, stream=True), lambda c: c.text)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ended == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("what", CHATS)
def test_streamed_and_whole_chats_are_equal(client, what):
    settings = asked_chat(CHATS[what])
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True)
    texts, ended = pieces(stream, lambda choice: choice.delta.content)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ended == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_are_those_of_the_whole(client, echo):
    settings = asked({"logprobs": 2, "echo": echo})
    whole = client.completions.create(**settings).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**settings, stream=True)
        if chunk.choices[0].logprobs
    ]
    for name in ("tokens", "text_offset"):
        assert [x for part in parts for x in getattr(part, name)] == getattr(whole, name)
    values = [x or 0 for part in parts for x in part.token_logprobs]
    assert values == pytest.approx([x or 0 for x in whole.token_logprobs], abs=1e-5)


def test_streamed_logprobs_of_a_chat_are_those_of_the_whole(client):
    settings = asked_chat({"logprobs": True, "top_logprobs": 1})
    whole = client.chat.completions.create(**settings).choices[0].logprobs.content
    parts = [
        one
        for chunk in client.chat.completions.create(**settings, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in parts] == [one.token for one in whole]


def test_all_chunks_of_a_stream_have_one_name(client):
    chunks = list(client.chat.completions.create(**asked_chat({}), stream=True))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_chat_begins_with_who_speaks(client):
    chunks = list(client.chat.completions.create(**asked_chat({"n": 2}), stream=True))
    roles = [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks]
    assert roles[:2] == [(0, "assistant"), (1, "assistant")]
    assert {role for _, role in roles[2:]} == {None}


def test_usage_comes_last_where_it_is_asked_for(client):
    settings = asked({})
    whole = client.completions.create(**settings).usage
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(**settings, **options)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.completion_tokens == 12
    assert last.usage.prompt_tokens == whole.prompt_tokens
    assert {chunk.usage for chunk in chunks} == {None}


def test_usage_comes_with_every_chunk_where_that_is_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(**asked_chat({}), stream=True, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)


def test_a_stream_is_one_of_events(http):
    with http.stream("POST", "/v1/completions", json=asked({"stream": True})) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert "usage" not in json.loads(event.removeprefix("data: "))


def test_what_is_wrong_with_a_request_is_said_before_its_stream(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**asked({"max_tokens": 5000}), stream=True)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**asked({}), stream_options={"include_usage": True})
    assert error.value.param == "stream_options"


def test_requests_of_all_kinds_at_once_are_answered_as_alone(client, served):
    kinds = [*(("completions", asked(s)) for s in TEXTS.values()),
             *(("chat", asked_chat(s)) for s in CHATS.values())]  # fmt: skip

    def alone(kind, settings):
        part = client.completions if kind == "completions" else client.chat.completions
        return _texts(kind, part.create(**settings))

    async def ask(other, kind, settings, stream):
        part = other.completions if kind == "completions" else other.chat.completions
        if not stream:
            return _texts(kind, await part.create(**settings))
        texts = {}
        async for chunk in await part.create(**settings, stream=True):
            for c in chunk.choices:
                piece = c.text if kind == "completions" else c.delta.content or ""
                texts[c.index] = texts.get(c.index, "") + piece
        return [texts[i] for i in sorted(texts)]

    async def together():
        url = f"{served.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as other:
            bad = [other.completions.create(**asked({"logprobs": 99})) for _ in range(4)]
            asks = [ask(other, *kind, stream) for kind in kinds for stream in (False, True)]
            found = await asyncio.gather(*asks, *bad, return_exceptions=True)
            return found[: len(asks)], found[len(asks) :]

    expected = [alone(*kind) for kind in kinds]
    found, refused = asyncio.run(together())
    assert found[::2] == expected
    assert found[1::2] == expected
    assert {type(error) for error in refused} == {openai.BadRequestError}


def _texts(kind, answer):
    return [c.text if kind == "completions" else c.message.content for c in answer.choices]
