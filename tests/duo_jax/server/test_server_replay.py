"""What was served to many at once is what one is served alone, from a cache of its own."""

import asyncio
import contextlib

import httpx2
import numpy as np
import openai
import pytest

from tests.duo_jax.server.conftest import wait_for
from tests.duo_jax.server.dense_engine import DenseEngine

TEXT = "Passkey third interpreter and the rest. "
GREEDY = [
    {"prompt": TEXT * 12, "max_tokens": 10},
    {"prompt": TEXT * 12 + "Passkey", "max_tokens": 10},
    {"prompt": "us us us", "max_tokens": 24, "frequency_penalty": 1.5},
    {"prompt": "us us us", "max_tokens": 24, "presence_penalty": 1.0, "logit_bias": {"300": 3}},
    {"prompt": ["é 你好", "Return the value"], "max_tokens": 12, "n": 2},
    {"prompt": "The class", "max_tokens": 12, "stop": ["class"], "echo": True},
    {"prompt": "Passkey", "max_tokens": 12, "extra_body": {"repetition_penalty": 1.3}},
]
DRAWN = [
    {"prompt": "Return", "max_tokens": 12, "temperature": 1.3, "seed": 5, "n": 2},
    {"prompt": "Return", "max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 6},
]


@pytest.mark.slow  # the engine alone is compared with dense caches in test_engine.py
def test_a_mixed_load_replayed_one_by_one_is_the_same(served, model, monkeypatch):
    recorded, submit = [], served.engine.submit

    def record(request, on_update):
        updates = []
        recorded.append((request, updates))

        def both(update):
            updates.append(update)
            on_update(update)

        return submit(request, both)

    monkeypatch.setattr(served.engine, "submit", record)

    async def ask():
        url = f"{served.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            asks = [
                client.completions.create(model="demo", logprobs=5, **settings)
                for settings in GREEDY + DRAWN
            ]
            return await asyncio.gather(*asks)

    answers = asyncio.run(ask())
    assert len(recorded) == sum(len(answer.choices) for answer in answers) == 13
    dense = DenseEngine(model)
    for request, updates in recorded:
        alone = []
        dense._answer(0, request, alone.append)
        for name in ("tokens", "logprobs"):
            assert len(_all(updates, name)) == len(_all(alone, name))
        assert _all(updates, "tokens") == _all(alone, "tokens")
        assert "".join(u.text for u in updates) == "".join(u.text for u in alone)
        assert updates[-1].finish_reason == alone[-1].finish_reason
        _assert_close(_all(updates, "logprobs"), _all(alone, "logprobs"))
        if request.prompt_logprobs is not None:
            prompt, expected = updates[0].prompt_logprobs, alone[0].prompt_logprobs
            assert prompt[0] is expected[0] is None
            _assert_close(prompt[1:], expected[1:])


def _all(updates, name):
    return [one for update in updates for one in getattr(update, name)]


def _assert_close(found, expected):
    def numbers(entries):
        return np.array([[e.logprob, *(logprob for _, logprob in e.top)] for e in entries])

    np.testing.assert_allclose(numbers(found), numbers(expected), atol=1e-4)


@pytest.mark.slow
def test_two_hundred_that_went_away_are_forgotten(served, client):
    body = {"prompt": TEXT * 20, "max_tokens": 300, "stream": True}
    client.completions.create(model="demo", prompt=TEXT * 20, max_tokens=2)  # compiled
    wait_for(lambda: served.engine.stats().running == 0)  # an answer is sent before its row is free
    before = served.engine.stats()

    async def read(http):
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_lines():
                pass

    async def leave(http):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(http), 0.5)

    async def all_of_them():
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=served.url, limits=limits, timeout=60) as http:
            await asyncio.gather(*(leave(http) for _ in range(200)))

    asyncio.run(all_of_them())
    answer = client.with_options(timeout=5).completions.create(
        model="demo", prompt="Return", max_tokens=4
    )
    assert answer.usage.completion_tokens == 4
    wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)
    after = served.engine.stats()
    assert after.pages_used == before.pages_used == 0
    served.engine.check()
