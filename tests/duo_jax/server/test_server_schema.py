"""Whatever is sent, the server answers as its OpenAPI schema says; schemathesis makes it up.

A body that fits the schema may still be refused: the model is another, the prompt too long. One
that does not fit must be, unless it only says more than it need.
"""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode, checks

CHECKED = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]
STREAMS = "text/event-stream"
PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/stats"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/"),
]
BODIES = [path for path in PATHS if path[0] == "POST"]


@pytest.fixture(scope="module")
def schema(http):
    return schemathesis.openapi.from_dict(http.get("/openapi.json").json())


def test_every_route_is_asked(schema):
    assert {(method.upper(), path) for path in schema for method in schema[path]} == set(PATHS)


def ask(schema, served, path, *, mode, examples):
    """Send made-up requests; check each answer."""
    operation = schema[path[1]][path[0]]
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )

    @settings
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        if isinstance(case.body, dict):
            case.body = _little(case.body)
        answer = case.call(base_url=served.url, timeout=30)
        case.validate_response(answer, checks=CHECKED)
        if answer.headers.get("content-type", [""])[0].startswith(STREAMS):
            assert answer.content.endswith(b"data: [DONE]\n\n")
        with served.http() as http:
            assert http.get("/health").status_code == 200

    send()


def _little(body):
    """Return a body that asks for few tokens, so that many can be asked."""
    asked = {"max_tokens", "max_completion_tokens", "n"} & body.keys()
    few = {
        name: min(body[name], 3)
        for name in asked
        if isinstance(body[name], int) and not isinstance(body[name], bool)
    }
    return body | few


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_answers_are_those_of_the_schema(schema, served, path):
    examples = 3 if path[0] == "POST" else 1
    ask(schema, served, path, mode=GenerationMode.POSITIVE, examples=examples)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("path", BODIES, ids=" ".join)
def test_what_is_not_of_the_schema_is_refused(schema, served, path):
    ask(schema, served, path, mode=GenerationMode.NEGATIVE, examples=3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("path", BODIES, ids=" ".join)
def test_answers_to_many_bodies_are(schema, served, path, mode):
    ask(schema, served, path, mode=mode, examples=400)
