"""What decoding one token costs with full caches, with split ones, and in other libraries.

    python -m benchmarks.decode

A Llama of random weights with the attention of a published model decodes token after token behind a
context of random keys and values. All splits of the model are timed in turn, in one process; beside
each stands the time of its attention part (a model of the same attention and width 2), the bytes of
its live cache, and the ratio of the bytes that a step has to read at least. transformers and
kvpress follow at every context, on the same saved weights (see benchmarks.rivals).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import decode_report, floors, machine, serving, shapes, sweep, timing
from benchmarks.rivals import Rival, RivalError
from benchmarks.serving import Decoder, Variant
from benchmarks.settings import ServingSettings
from duo_jax import cli
from duo_jax.cache import Cache
from duo_jax.config import ModelConfig
from duo_jax.errors import InputError

_WARMUP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig(ServingSettings):
    """Flags of the benchmark."""

    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Tokens in the cache when decoding begins."""
    steps: int = 16
    """Timed steps of every program and context; the median counts."""
    rival_steps: int = 6
    """Timed steps of other libraries."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/decode")
    """Where to write .json, .md and .png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contexts or min(self.steps, self.rival_steps, *self.contexts) < 1:
            raise InputError("contexts, steps and rival steps must be at least 1")


def main(config: DecodeConfig) -> None:
    """Measure, print a table, write it, JSON and a picture."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    rows_of = functools.partial(_sweep, config)
    result = sweep.measure(
        config,
        rows_of,
        module="benchmarks.decode",
        extra={"read_bandwidth": machine.read_bandwidth},
    )
    sweep.publish(result, config.out, decode_report)


def _sweep(
    config: DecodeConfig,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model."""
    params = serving.load_params(folder, model)
    attention_params = serving.attention_params(model, config.dtype)
    variants = serving.variants(
        model, config.retrieval, sink_size=config.sink, recent_size=config.recent
    )
    for context in tqdm(config.contexts, desc=geometry, disable=None):
        rows = _ours(config, context, variants, params, attention_params)
        rows += [row for rival in libraries for row in _theirs(config, context, variants, rival)]
        for row in rows:
            if "ms" in row:
                row["speedup"] = rows[0]["ms"]["median"] / row["ms"]["median"]
            yield {"geometry": geometry, "context": context, **row}


def _ours(
    config: DecodeConfig, context: int, variants: list[Variant], params, attention_params
) -> list[dict[str, Any]]:
    """Measure all splits at one context."""
    max_len = context + 2 * (1 + config.steps)  # two programs decode into each cache
    measured = {
        variant.name: _Measured(config, context, max_len, variant, params, attention_params)
        for variant in variants
    }
    calls = {
        f"{name} {part}": call
        for name, one in measured.items()
        for part, call in (("step", one.step), ("attention", one.attention))
    }
    for call in calls.values():
        call()
    # One step at a time: so gigabytes of weights pass between two steps of an attention part,
    # which finds its cache in main memory then, as it does within a whole step.
    seconds = timing.interleaved(calls, rounds=config.steps)

    rows = []
    itemsize = jnp.dtype(config.dtype).itemsize
    for variant in variants:
        heads, one = variant.config.retrieval_heads, measured[variant.name]
        rows.append(
            {
                "name": variant.name,
                "library": "duo_jax",
                "retrieval": variant.retrieval,
                "retrieval_heads": heads,
                "ms": timing.summary(seconds[f"{variant.name} step"], scale=1e3),
                "attention_ms": timing.summary(seconds[f"{variant.name} attention"], scale=1e3),
                "cache_bytes": serving.live_bytes(one.cache),
                "cache_bytes_formula": floors.kv_bytes(
                    variant.config.model,
                    heads,
                    retrieval_tokens=max_len,
                    streaming_tokens=config.sink + config.recent,
                    itemsize=itemsize,
                ),
                "in_place": one.in_place,
                "temp_bytes": one.temp_bytes,
                "floor_bytes": floors.decode_bytes(
                    variant.config.model,
                    heads,
                    context=context,
                    ring_slots=config.sink + config.recent,
                    itemsize=itemsize,
                ),
            }
        )
    full = rows[0]
    for row in rows:
        row["attention_speedup"] = full["attention_ms"]["median"] / row["attention_ms"]["median"]
        for part in ("step", "attention"):
            ratio = full["floor_bytes"][part] / row["floor_bytes"][part]
            row[f"floor_{part}_speedup"] = ratio
    return rows


class _Measured:
    """A split model, its attention part, and the cache that both decode into."""

    def __init__(
        self, config: DecodeConfig, context: int, max_len: int, variant: Variant,
        params, attention_params,
    ) -> None:  # fmt: skip
        split = variant.config
        self.cache = serving.filled_cache(
            split, context=context, max_len=max_len, dtype=config.dtype
        )
        only = dataclasses.replace(split, model=shapes.attention_only(split.model))
        self._step = Decoder(split, params, self.cache)
        self._attention = Decoder(only, attention_params, self.cache)
        self._buffers = _pointers(self.cache)

    def step(self) -> None:
        self.cache = self._step.step(self.cache)

    def attention(self) -> None:
        self.cache = self._attention.step(self.cache)

    @property
    def in_place(self) -> bool:
        """Whether the cache still lies where it was made."""
        return _pointers(self.cache) == self._buffers

    @property
    def temp_bytes(self) -> int:
        return self._step.temp_bytes


def _pointers(cache: Cache) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)}


def _theirs(
    config: DecodeConfig, context: int, variants: list[Variant], rival: Rival
) -> Iterator[dict[str, Any]]:
    """Measure a library at one context."""
    common = {"context": context, "warmup": _WARMUP, "steps": config.rival_steps}
    if rival.library == "transformers":
        requests = {
            f"transformers, {cache}": {"cache": cache} for cache in ("DynamicCache", "StaticCache")
        }
    else:
        requests = {
            f"kvpress {variant.retrieval:.0%}": {
                "retrieval_heads": variant.config.retrieval_heads,
                "sink": config.sink,
                "recent": config.recent,
            }
            for variant in variants[1:]
        }
    for name, request in requests.items():
        try:
            answer = rival.measure("decode", **common, **request)
        except RivalError as error:
            yield {"skipped": f"{name} at {context:,} tokens: {error}"}
            continue
        yield {
            "name": name,
            "library": rival.library,
            "ms": timing.summary(answer.pop("seconds"), scale=1e3),
            **answer,
        }


if __name__ == "__main__":
    cli.run(
        main,
        DecodeConfig,
        prog="python -m benchmarks.decode",
        description=__doc__.split("\n\n")[0],
    )
