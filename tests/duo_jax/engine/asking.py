"""Requests to an engine of one layer of the demo model, and what comes back, for tests."""

import dataclasses

from duo_jax import SamplingConfig
from duo_jax.engine import Engine, Request

LONG = "The pass key is seven. Remember it. " + "Grass is green and the sky is blue. " * 8
PROMPTS = [
    "Once upon a time",
    LONG,
    "A",
    "The quick brown fox jumps over the lazy dog. " * 3,
    LONG + "What is the pass key?",
]
DRAWN = SamplingConfig(temperature=0.9, top_p=0.95)


def make(model, **changes) -> Engine:
    sizes = {"max_requests": 4, "max_len": 320, "cache_tokens": 1024, "prefill_chunk": 64}
    return Engine(model, **(sizes | changes))


class Answer:
    """What came back for a request."""

    def __init__(self):
        self.updates = []

    def __call__(self, update):
        assert not self.updates or self.updates[-1].finish_reason is None
        self.updates.append(update)

    @property
    def text(self):
        return "".join(update.text for update in self.updates)

    @property
    def tokens(self):
        return [token for update in self.updates for token in update.tokens]

    @property
    def logprobs(self):
        return [item for update in self.updates for item in update.logprobs]

    @property
    def reason(self):
        return self.updates[-1].finish_reason if self.updates else None

    @property
    def cached(self):
        return self.updates[-1].cached_tokens


def request(model, prompt, max_tokens=20, **settings) -> Request:
    tokens = tuple(model.tokenization.encode(prompt))
    return Request(prompt=tokens, max_tokens=max_tokens, **settings)


def run(served: Engine, *requests: Request) -> list[Answer]:
    """Serve requests that come at once; the books are checked after every step."""
    answers = [Answer() for _ in requests]
    for each, answer in zip(requests, answers, strict=True):
        served.submit(each, answer)
    while served.step():
        served.check()
    return answers


def alone(model, prompt, max_tokens=20, seed=0, sampling=None, **settings):
    """Return what the model writes with a dense cache of its own."""
    options = dataclasses.asdict(sampling) if sampling else {}
    [text] = model.generate([prompt], max_new_tokens=max_tokens, seed=seed, **options, **settings)
    return text
