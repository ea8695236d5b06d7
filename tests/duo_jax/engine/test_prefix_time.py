"""How long a kept beginning of 32K tokens takes until the first token."""

import json
import pathlib
import shutil
import time

import numpy as np
import pytest

import duo_jax
from duo_jax.checkpoints.pretrained import DEMO, resolve
from duo_jax.engine import Engine, Request
from tests.duo_jax.engine.asking import Answer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unhooked")]

NUM_TOKENS = 32 * 1024


def first_token(served: Engine, prompt: tuple[int, ...]) -> tuple[float, Answer]:
    """Return the seconds until a request's first token, and what came back."""
    answer = Answer()
    began = time.perf_counter()
    served.submit(Request(prompt=prompt, max_tokens=8, ignore_eos=True), answer)
    while not answer.tokens:
        served.step()
    seconds = time.perf_counter() - began
    while served.step():
        pass
    return seconds, answer


def test_a_beginning_of_32k_tokens_asked_again_costs_a_twentieth(tmp_path: pathlib.Path):
    folder = tmp_path / "long"
    shutil.copytree(resolve(DEMO), folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2 * NUM_TOKENS
    (folder / "config.json").write_text(json.dumps(config))
    model = duo_jax.load(str(folder), sparsity=0.5)
    served = Engine(
        model, max_requests=2, max_len=NUM_TOKENS + 256, cache_tokens=2 * NUM_TOKENS + 512
    )
    rng = np.random.default_rng(0)
    # The first text compiles all programs, those of going on from a kept beginning included.
    compiles, measured = (tuple(rng.integers(2, 1000, NUM_TOKENS + 37).tolist()) for _ in range(2))
    for _ in range(2):
        first_token(served, compiles)
    cold, read = first_token(served, measured)
    warm, again = first_token(served, (*measured[:NUM_TOKENS], 5, 6, 7))
    print(f"cold {cold:.2f} s, again {warm:.3f} s, {warm / cold:.2%}")
    assert (read.cached, again.cached) == (0, NUM_TOKENS)
    assert warm <= 0.05 * cold
