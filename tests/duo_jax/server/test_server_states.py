"""A server that loads, is full, loses its clients, fails, or ends; and who may ask it what."""

import threading
import time

import openai
import pytest

from duo_jax.engine.request import Update
from duo_jax.errors import InputError
from tests.duo_jax.server.conftest import serving_of, wait_for
from tests.duo_jax.server.dense_engine import DenseEngine

PROMPT = "Passkey first"


def asked(**settings):
    return {"model": "demo", "prompt": PROMPT, "max_tokens": 4} | settings


@pytest.fixture
def slow(model):
    """Yield a server whose engine stands still until its gate is opened."""
    engine = DenseEngine(model, most_waiting=1)
    engine.gate.clear()
    with serving_of(lambda: engine) as running:
        wait_for(lambda: running.service.status == "ready")
        yield running
        engine.gate.set()


def test_a_server_that_loads_says_so(model):
    go = threading.Event()

    def load():
        go.wait()
        return DenseEngine(model)

    with serving_of(load) as loading, loading.http() as http:
        assert http.get("/health").status_code == 503
        assert http.get("/health").json() == {"status": "loading"}
        assert http.get("/version").status_code == 200
        assert http.get("/").status_code == 200
        assert http.get("/stats").json()["status"] == "loading"
        assert http.get("/metrics").status_code == 200
        for path in ("/v1/models", "/tokenizer_info"):
            answer = http.get(path)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"] == "1"
        assert http.post("/v1/completions", json=asked(model="other")).status_code == 503
        go.set()
        wait_for(lambda: http.get("/health").status_code == 200)
        assert http.post("/v1/completions", json=asked()).status_code == 200


def test_a_model_that_cannot_be_loaded_is_not_waited_for():
    def load():
        raise InputError("no such model")

    with serving_of(load) as failing, failing.http() as http:
        wait_for(lambda: failing.service.status == "failed")
        assert str(failing.service.error) == "no such model"
        assert http.get("/health").status_code == 503
        assert http.get("/v1/models").json()["error"]["code"] == "failed"


def test_requests_beyond_the_queue_are_refused_and_the_others_answered(slow):
    found = []

    def ask():
        found.append(slow.client().completions.create(**asked()).choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    wait_for(lambda: slow.engine.stats().running == 1)
    threads[1].start()
    wait_for(lambda: slow.engine.stats().waiting == 1)
    with pytest.raises(openai.RateLimitError) as error:
        slow.client().completions.create(**asked())
    assert error.value.response.headers["retry-after"] == "1"
    slow.engine.gate.set()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_of_several_texts_none_is_written_if_one_finds_no_place(slow):
    with pytest.raises(openai.RateLimitError):
        slow.client().completions.create(**asked(n=4))
    slow.engine.gate.set()
    wait_for(lambda: slow.engine.stats().finished == len(slow.engine.cancelled) > 0)
    assert slow.engine.stats().new_tokens == 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_requests_of_a_client_that_goes_away_are_cancelled(slow, path, stream):
    body = asked(stream=stream) | {"messages": [{"role": "user", "content": "?"}]}
    with slow.http() as http, pytest.raises(Exception, match="timed out"):
        http.post(f"/v1/{path}", json=body, timeout=0.3)
    wait_for(lambda: slow.engine.cancelled == {1})
    slow.engine.gate.set()
    assert slow.client().completions.create(**asked()).usage.completion_tokens == 4


def test_a_stream_that_is_left_is_cancelled(slow):
    slow.engine.gate.set()
    stream = slow.client().completions.create(**asked(max_tokens=1000), stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: slow.engine.cancelled == {1})


def test_a_server_that_ends_lets_requests_end_and_takes_no_more(slow):
    found = []

    def ask():
        stream = slow.client().completions.create(**asked(), stream=True)
        found.extend(chunk.choices[0].finish_reason for chunk in stream)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: slow.engine.stats().running == 1)
    slow.server.drain()
    wait_for(lambda: slow.service.status == "draining")
    with slow.http() as http:
        assert http.get("/health").json() == {"status": "draining"}
        answer = http.post("/v1/completions", json=asked())
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
    slow.engine.gate.set()
    thread.join()
    assert found[-1] == "length"
    wait_for(lambda: slow.server.should_exit)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_answers_what_waits_for_it(model, stream, monkeypatch):
    engine = DenseEngine(model)

    def fail(ticket, request, on_update):
        del ticket, request
        on_update(Update(text="a", tokens=(5,)))
        time.sleep(0.3)  # so that the answer is waited for
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "_answer", fail)
    with serving_of(lambda: engine) as failing:
        wait_for(lambda: failing.service.status == "ready")
        with pytest.raises(openai.APIError) as error:
            list(failing.client().completions.create(**asked(stream=stream)))
        assert "engine failed" in str(error.value)
        assert "device" not in str(error.value)  # that is for the log
        wait_for(lambda: failing.service.status == "failed")


def test_a_defect_is_answered_without_its_details(model, monkeypatch):
    engine = DenseEngine(model)

    def fail(*_):
        raise KeyError("secret")

    monkeypatch.setattr(engine, "submit", fail)
    with serving_of(lambda: engine) as failing, failing.http() as http:
        wait_for(lambda: failing.service.status == "ready")
        answer = http.post("/v1/completions", json=asked())
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text


def test_only_those_with_a_key_are_answered(model):
    with serving_of(lambda: DenseEngine(model), keys=frozenset(["one", "zwei-é"])) as keyed:
        wait_for(lambda: keyed.service.status == "ready")
        for given in ("Bearer two", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer"):
            with keyed.http(headers={"authorization": given}) as http:
                answer = http.post("/v1/completions", json=asked())
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                for path in ("/v1/models", "/metrics", "/stats", "/tokenizer_info", "/nothing"):
                    assert http.get(path).status_code == 401
                for path in ("/", "/health", "/version"):
                    assert http.get(path).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            keyed.client(api_key="two").models.list()
        assert keyed.client(api_key="one").models.list().data[0].id == "demo"
        with keyed.http(headers={"authorization": "bearer zwei-é".encode()}) as http:
            assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large_are_refused(model, chunked):
    with serving_of(lambda: DenseEngine(model), most_bytes=1000) as small, small.http() as http:
        wait_for(lambda: small.service.status == "ready")
        body = b'{"prompt": "%s"}' % (b"a" * 2000)
        headers = {"content-type": "application/json"}
        content = iter([body[:900], body[900:]]) if chunked else body
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["error"]["message"]
        assert http.post("/v1/completions", json=asked()).status_code == 200
