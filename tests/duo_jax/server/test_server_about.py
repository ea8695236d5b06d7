"""What the server tells about itself: models, tokenizer, metrics; and errors in one shape."""

import importlib.metadata
import json

import openai
import pydantic
import pytest
from prometheus_client.parser import text_string_to_metric_families

from duo_jax.server.schema import ChatBody, CompletionBody, DetokenizeBody

TEXT = "Passkey first function arguments"


def test_the_model_is_listed(client, served):
    [found] = client.models.list().data
    assert found.id == "demo"
    assert found.max_model_len == served.engine.max_len
    assert client.models.retrieve("demo") == found


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt=TEXT)
    assert error.value.code == "model_not_found"


def test_a_body_need_not_name_the_model(http):
    assert http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/models", 404), ("GET", "/docs", 404), ("GET", "/v1/completions", 405)],
)
def test_there_is_nothing_else(http, method, path, status):
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[]",
    "no object": b'"prompt"',
    "not a number": b'{"prompt": "a", "temperature": NaN}',
    "no end": b'{"prompt": "a", "temperature": Infinity}',
    "a number of many digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "lists in lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects in objects": b'{"prompt": "a", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "bytes that are no text": b'{"prompt": "\xff\xfe"}',
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_is_damaged_is_refused(http, what):
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/completions", content=BODIES[what], headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


MANY = 20_000


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (CompletionBody, {"prompt": [1.5] * MANY}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [""] * MANY}),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(i): "x" for i in range(MANY)}}),
        (ChatBody, {"messages": [0] * MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatBody, {"messages": [{"role": "user", "content": ""}], "tools": [0] * MANY}),
        (DetokenizeBody, {"tokens": [""] * MANY}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else list(x)[-1],
)
def test_a_body_with_many_faults_is_refused_at_the_first(body, fields):
    """An error for each would take seconds and gigabytes, while all others wait."""
    with pytest.raises(pydantic.ValidationError) as error:
        body.model_validate(fields)
    assert error.value.error_count() < 5000


def test_a_body_must_say_that_it_is_json(http):
    """A page of another site may send text, without being asked for permission."""
    body = json.dumps({"prompt": TEXT}).encode()
    answer = http.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_tokens_are_those_of_the_tokenizer(http, model):
    found = http.post("/tokenize", json={"prompt": TEXT}).json()
    assert found["tokens"] == model.tokenization.encode(TEXT)
    assert found["count"] == len(found["tokens"])
    assert set(found) == {"count", "max_model_len", "tokens"}
    alone = {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    bare = http.post("/tokenize", json=alone).json()
    assert bare["tokens"] == found["tokens"][1:]
    assert "".join(bare["token_strs"]).replace("Ġ", " ") == TEXT
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": TEXT}


@pytest.mark.parametrize("prompt", ["", "é 你好 🎉"])
def test_any_text_comes_back(http, prompt):
    body = {"prompt": prompt, "add_special_tokens": False}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": prompt}


def test_what_cannot_be_tokenized_is_refused(http):
    message = [{"role": "user", "content": "?"}]
    assert http.post("/tokenize", json={}).status_code == 400
    half = {"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}
    assert http.post("/tokenize", **half).status_code == 400
    too_long = {"prompt": "word " * 1_000_000}
    assert http.post("/tokenize", json=too_long).status_code == 400
    both = {"prompt": "a", "messages": message}
    assert http.post("/tokenize", json=both).status_code == 400
    assert http.post("/detokenize", json={"tokens": [1024]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_the_tokenizer_is_described(http, model):
    found = http.get("/tokenizer_info").json()
    assert found["chat_template"] == model.tokenizer.chat_template
    assert (found["bos_token"], found["eos_token"]) == ("<|begin|>", "<|end|>")
    assert found["stop_token_ids"] == [1]
    assert found["vocab_size"] == 1024


def test_versions_are_told(http):
    assert http.get("/version").json()["version"] == importlib.metadata.version("duo_jax")


def metrics(http):
    text = http.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_done(http):
    before = metrics(http)
    body = {"prompt": ["Return " * 9, TEXT], "max_tokens": 6, "n": 2}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    after = metrics(http)

    def more(*name):
        return after[name] - before.get(name, 0)

    assert more("duo_jax_new_tokens_total") == 24 == usage["completion_tokens"]
    assert more("duo_jax_requests_total", "length") == 4
    assert more("duo_jax_finished_total") == 4
    read = more("duo_jax_prompt_tokens_total") + more("duo_jax_cached_tokens_total")
    assert read == 2 * usage["prompt_tokens"]
    assert more("duo_jax_request_seconds_count") == 1
    assert more("duo_jax_time_to_first_token_seconds_count") == 1
    assert more("duo_jax_time_per_token_seconds_sum") > 0
    assert after["duo_jax_ready",] == 1
    assert after["duo_jax_running",] == after["duo_jax_waiting",] == 0


def test_while_a_text_is_written_its_cache_is_smaller_than_a_full_one(client, http):
    stream = client.completions.create(model="demo", prompt=TEXT * 40, max_tokens=100, stream=True)
    next(iter(stream))
    now = http.get("/stats").json()
    stream.close()
    assert now["running"] == 1
    assert 0 < now["cache_bytes"] < now["full_cache_bytes"]
