"""Thousands of requests of all kinds, with faults: memory stays flat, no page is lost."""

import gc
import resource
import tracemalloc

import jax
import numpy as np
import pytest

import duo_jax
from duo_jax import SamplingConfig
from duo_jax.engine import Engine, QueueFullError, Request

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unhooked")]

NUM_REQUESTS = 2_000
BEGINNINGS = [tuple(range(start, start + 200)) for start in (10, 300, 600)]


class Faulty:
    """A grammar that breaks after some tokens."""

    def __init__(self, steps, vocab_size):
        self._left, self._words = steps, -(-vocab_size // 32)

    def allowed(self):
        return np.full(self._words, -1, np.int32)

    def accept(self, token):
        del token
        self._left -= 1
        if not self._left:
            raise ValueError("this grammar is broken")


def random_request(rng, vocab_size) -> Request:
    beginning = BEGINNINGS[rng.integers(3)][: rng.integers(0, 200)] if rng.random() < 0.5 else ()
    own = tuple(rng.integers(2, vocab_size, rng.integers(1, 150)).tolist())
    draws = rng.random() < 0.5
    faulty = rng.random() < 0.05
    scored = rng.random() < 0.1
    long = not beginning and rng.random() < 0.2  # needs more pages while it is written
    return Request(
        prompt=(*beginning, *own),
        max_tokens=200 if long else int(rng.integers(not scored, 40)),
        sampling=SamplingConfig(
            temperature=float(rng.random() * 2) if draws else 0.0,
            top_k=int(rng.integers(0, 50)),
            top_p=float(rng.uniform(0.1, 1)),
            min_p=float(rng.random() * 0.1),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
        ),
        presence_penalty=float(rng.choice([0.0, 0.5])),
        logit_bias={5: 2.0} if rng.random() < 0.1 else {},
        logprobs=3 if rng.random() < 0.2 else None,
        prompt_logprobs=2 if scored else None,
        seed=int(rng.integers(1000)),
        stop=("e",) if rng.random() < 0.2 else (),
        ignore_eos=bool(rng.random() < 0.5),
        token_filter=Faulty(int(rng.integers(1, 9)), vocab_size) if faulty else None,
    )


def test_memory_is_flat_and_no_page_is_lost(capfd):
    model = duo_jax.load("demo", sink_size=4, recent_size=12)
    served = Engine(model, max_requests=6, max_len=400, cache_tokens=768, queue=12, snapshots=5)
    rng, vocab_size = np.random.default_rng(0), model.config.architecture.vocab_size
    ended, tickets, marks = {}, [], []

    def listener(index, raises):
        def hear(update):
            if raises:
                raise OSError("gone")
            assert index not in ended
            if update.finish_reason:
                ended[index] = update.finish_reason

        return hear

    raising = set()
    for index in range(NUM_REQUESTS):
        raises = rng.random() < 0.03
        while True:
            try:
                asked = random_request(rng, vocab_size)
                tickets.append(served.submit(asked, listener(index, raises)))
                break
            except QueueFullError:
                served.step()
                served.check()
        if raises:
            raising.add(index)
        if rng.random() < 0.1:
            served.cancel(tickets[rng.integers(len(tickets))])
        for _ in range(rng.integers(0, 4)):
            served.step()
            served.check()
        if index in (NUM_REQUESTS // 2, NUM_REQUESTS - 1):
            gc.collect()
            arrays = sum(x.nbytes for x in jax.live_arrays())
            marks.append((arrays, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        if index == NUM_REQUESTS // 2:
            tracemalloc.start()
            first = tracemalloc.get_traced_memory()[0]
    while served.step():
        served.check()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert set(ended) | raising == set(range(NUM_REQUESTS))
    counts = {reason: list(ended.values()).count(reason) for reason in set(ended.values())}
    assert set(counts) == {"length", "stop", "cancelled", "error"}, counts
    stats = served.stats()
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.finished == NUM_REQUESTS
    assert stats.preempted > 0
    assert stats.cached_tokens > 0
    (arrays, peak), (arrays_after, peak_after) = marks
    assert arrays_after <= arrays + 10_000
    assert peak_after - peak < 30_000  # kB
    assert grown < 2_000_000
    assert "grammar is broken" not in capfd.readouterr().err  # told to its own request alone
