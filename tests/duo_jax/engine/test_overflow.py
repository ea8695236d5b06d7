"""A text whose numbers overflow ends with an error, and leaves nothing to other texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.duo_jax.engine.asking import LONG, PROMPTS, Answer, alone, make, request, run

pytestmark = pytest.mark.usefixtures("unhooked")


def spoil(served, text):
    """Put NaN where the text's third token is held by retrieval heads, and into its rings."""
    device, page = served._scheduler._device, text.pages[0]

    def in_page(pool):
        return pool.at[page, :, 2].set(jnp.nan)

    def in_row(ring):
        return ring.at[text.row].set(jnp.nan)

    layers = []
    for layer in device._layers:
        full = [
            dataclasses.replace(part, keys=in_page(part.keys), values=in_page(part.values))
            for part in layer.full
        ]
        streaming = jax.tree.map(in_row, layer.streaming)
        layers.append(dataclasses.replace(layer, full=tuple(full), streaming=streaming))
    device._layers = tuple(layers)


@pytest.mark.parametrize("steps", [1, 8], ids=["while it is read", "while it is written"])
def test_it_ends_alone_and_its_pages_are_clean(model, steps):
    served = make(model, cache_tokens=512, prefix_reuse=False)
    lost, beside = Answer(), Answer()
    served.submit(request(model, LONG, max_tokens=40), lost)
    served.submit(request(model, PROMPTS[3]), beside)
    for _ in range(steps):
        served.step()
    assert bool(lost.tokens) == (steps > 1)
    [text] = [text for text in served._scheduler.texts if text.request.max_tokens == 40]
    spoil(served, text)
    while served.step():
        served.check()
    assert lost.reason == "error"
    assert "infinite or undefined" in lost.updates[-1].error
    assert beside.text == alone(model, PROMPTS[3])
    assert served.stats().pages_used == 0
    for leaf in jax.tree.leaves(served._scheduler._device._layers):
        assert np.isfinite(leaf).all()
    again = run(served, *(request(model, prompt) for prompt in PROMPTS))
    assert [answer.text for answer in again] == [alone(model, prompt) for prompt in PROMPTS]
