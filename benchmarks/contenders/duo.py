"""duo_jax itself, as `duo_jax.load` and a session run it."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import duo_jax
from benchmarks.contenders import answering
from duo_jax.checkpoints import pretrained
from duo_jax.heads.pattern import Pattern
from duo_jax.plan import estimate
from duo_jax.plan.estimate import Workload
from duo_jax.plan.settings import Setting
from duo_jax.session.row_cache import chunk_width
from duo_jax.session.session import Session

RANDOM = "random"


class Duo:
    """A split model; "random" is a pattern without meaning, whose heads cost what others cost."""

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["pattern"] == RANDOM:
            settings["pattern"] = _random_pattern(settings["model"])
        self._runtime = duo_jax.load(**settings).runtime
        self.versions = {"duo_jax": version("duo_jax"), "jax": jax.__version__}

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        session = Session(self._runtime)
        session.append([tokens], room=count)
        for (new,) in session.decode(max_new_tokens=count):
            yield from new

    def warm_up(self, tokens: list[int], count: int) -> None:
        """Compile: read the first chunk, and one token of the next, into a cache for all."""
        runtime = self._runtime
        first = chunk_width(len(tokens), runtime.prefill_chunk, runtime.prefill_mode, more=False)
        some, session = tokens[: first + 1], Session(runtime)
        session.append([some], room=len(tokens) - len(some) + count)
        for _ in session.decode(max_new_tokens=min(count, 3)):
            pass

    def step_bytes(self, context: int) -> int:
        runtime = self._runtime
        workload = Workload(config=runtime.config, dtype=runtime.dtype.name)
        counted = estimate.estimate(workload, Setting(duo=True, weights=runtime.weight_format))
        return counted.weights_read + counted.cache_read(context)


def _random_pattern(model: str) -> Pattern:
    architecture = pretrained.load_config(pretrained.resolve(model))
    shape = (architecture.num_layers, architecture.num_kv_heads)
    gates = np.random.default_rng(0).random(shape)
    return Pattern(gates=gates, sink_size=0, recent_size=1)  # the sizes are given to load


if __name__ == "__main__":
    answering.answer(Duo)
