"""After it has warmed up, a server compiles nothing for requests of any size."""

import pytest

from duo_jax.engine.engine import Engine
from duo_jax.engine.request import Request
from duo_jax.serve import row_sampling, rows
from duo_jax.server.service import Service, Settings
from duo_jax.server.warm_up import warm_up

# Few pages; the chunks of a prompt have up to three widths.
SIZES = {"max_requests": 5, "max_len": 600, "cache_tokens": 640, "prefill_chunk": 512}


@pytest.fixture
def engine(model):
    return Engine(model, **SIZES)


def run(engine, *requests):
    updates = []
    for request in requests:
        engine.submit(request, updates.append)
    while engine.step():
        pass
    assert sum(update.finish_reason == "length" for update in updates) == len(requests)
    return [token for update in updates for token in update.tokens]


def programs():
    """Return how many programs each function has been compiled to."""
    found = {**vars(rows), **vars(row_sampling)}
    return {name: f._cache_size() for name, f in found.items() if hasattr(f, "_cache_size")}


def test_nothing_is_compiled_later(engine, model):
    """Though what was warmed up had a short queue; chunks of every width were read."""
    before, short, widths = programs(), Engine(model, queue=2, **SIZES), set()
    prefill = short._scheduler._device.prefill

    def seen(*args, width, **more):
        widths.add(width)
        return prefill(*args, width=width, **more)

    short._scheduler._device.prefill = seen
    warm_up(short)
    assert widths == {64, 256, 512}
    assert short.stats().waiting == 0
    warm = programs()
    assert warm["decode_rows"] - before["decode_rows"] >= 1  # five rows: no other test has them
    requests = [
        Request(prompt=tuple(range(2, 2 + length)), max_tokens=tokens, ignore_eos=True)
        for length, tokens in ((1, 4), (63, 9), (64, 1), (65, 5), (255, 3), (590, 6), (2, 40))
    ]
    first = run(engine, requests[0])
    run(engine, Request(prompt=(*requests[0].prompt, *first, 9, 9), max_tokens=1, ignore_eos=True))
    assert engine.stats().cached_tokens == 4  # within a page, which is copied
    run(engine, *requests)
    assert programs() == warm


def test_what_it_did_is_not_counted(engine):
    service = Service(Settings(name="demo", root="demo"), lambda: engine)
    warm_up(engine)
    service._engine = engine
    service.metrics.begin()
    assert engine.stats().new_tokens > 0
    assert service.metrics.stats()["new_tokens"] == 0
    run(engine, Request(prompt=(5, 6), max_tokens=3, ignore_eos=True))
    assert service.metrics.stats()["new_tokens"] == 3


def test_an_engine_that_fails_is_told(engine, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no device")

    monkeypatch.setattr(engine._scheduler, "step", fail)
    with pytest.raises(RuntimeError, match="the engine fails"):
        warm_up(engine)
    assert "no device" in capsys.readouterr().err
