"""What decoding one token costs with full caches, with split ones, and in other libraries.

    python -m benchmarks.decode

A Llama of random weights with the attention of a published model decodes token after token behind a
context of random keys and values. All splits of the model are timed in turn, in one process; beside
each stands the time of its attention part (a model of the same attention and width 2), the bytes of
its live cache, and the ratio of the bytes that a step has to read at least. transformers and
kvpress follow at every context, on the same saved weights (see benchmarks.serving.rivals).

A table of its own has one of the splits with the cache in every format
(benchmarks.serving.decode_kv).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.serving import (
    decode_kv,
    decode_kv_report,
    decode_report,
    floors,
    shapes,
    sweep,
    timing,
)
from benchmarks.serving import (
    variants as serving,
)
from benchmarks.serving.decode_parts import StepAndAttention
from benchmarks.serving.rivals import Rival, RivalError
from benchmarks.serving.settings import ServingSettings
from benchmarks.serving.variants import Variant
from duo_jax import cli, files
from duo_jax.cache import KVFormat, live_bytes
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.reports import machine

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
    tables: tuple[Literal["splits", "kv"], ...] = ("splits", "kv")
    """What to measure: splits and other libraries, formats of the cache."""
    kv: tuple[KVFormat, ...] = ("bf16", "int8", "int4", "int2")
    """Formats of the cache, beside the model's own."""
    kv_contexts: tuple[int, ...] = (1024, 4096, 16384)
    """As contexts, of the table of formats."""
    kv_geometry: shapes.Geometry = "gqa"
    """As geometries, of the table of formats."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/decode")
    """Where to write .json, .md and .png; the table of formats goes to OUT_kv."""

    def __post_init__(self) -> None:
        super().__post_init__()
        contexts = (*self.contexts, *self.kv_contexts)
        if not (self.tables and self.contexts and self.kv_contexts):
            raise InputError("there must be tables and contexts to measure")
        if min(self.steps, self.rival_steps, *contexts) < 1:
            raise InputError("contexts, steps and rival steps must be at least 1")
        if "kv" in self.tables and not self.retrieval:
            raise InputError("the table of KV formats needs a fraction of retrieval heads")


def main(config: DecodeConfig) -> None:
    """Measure, print tables, write them, JSON and pictures."""
    files.make_folder(config.out.parent)
    extra = {"read_bandwidth": machine.read_bandwidth}
    if "splits" in config.tables:
        rows_of = functools.partial(_sweep, config)
        result = sweep.measure(config, rows_of, module="benchmarks.decode", extra=extra)
        sweep.publish(result, config.out, decode_report)
    if "kv" in config.tables:
        only = dataclasses.replace(config, geometries=(config.kv_geometry,), rivals=())
        rows_of = functools.partial(_formats, config)
        result = sweep.measure(only, rows_of, module="benchmarks.decode", extra=extra)
        out = config.out.with_name(f"{config.out.name}_kv")
        sweep.publish(result, out, decode_kv_report)


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


def _formats(
    config: DecodeConfig,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model, its cache in every format."""
    del libraries
    full, duo, *_ = serving.variants(
        model, config.retrieval, sink_size=config.sink, recent_size=config.recent
    )
    params = serving.load_params(folder, model)
    attention_params = serving.attention_params(model, config.dtype)
    for context in tqdm(config.kv_contexts, desc=f"{geometry}, KV", disable=None):
        rows = decode_kv.rows(
            [(full, "model"), (duo, "model"), *((duo, kv) for kv in config.kv)],
            params,
            attention_params,
            context=context,
            steps=config.steps,
            dtype=config.dtype,
        )
        for row in rows:
            yield {"geometry": geometry, "context": context, **row}


def _ours(
    config: DecodeConfig, context: int, variants: list[Variant], params, attention_params
) -> list[dict[str, Any]]:
    """Measure all splits at one context."""
    max_len = context + 2 * (1 + config.steps)  # two programs decode into each cache
    measured = {
        variant.name: StepAndAttention(
            variant.config,
            params,
            attention_params,
            context=context,
            max_len=max_len,
            dtype=config.dtype,
        )
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
        heads, one = variant.config.retrieval_counts, measured[variant.name]
        rows.append(
            {
                "name": variant.name,
                "library": "duo_jax",
                "retrieval": variant.retrieval,
                "retrieval_heads": heads,
                "ms": timing.summary(seconds[f"{variant.name} step"], scale=1e3),
                "attention_ms": timing.summary(seconds[f"{variant.name} attention"], scale=1e3),
                "cache_bytes": live_bytes(one.cache),
                "cache_bytes_formula": floors.kv_bytes(
                    variant.config.architecture,
                    heads,
                    retrieval_tokens=max_len,
                    streaming_tokens=config.sink + config.recent,
                    itemsize=itemsize,
                ),
                "in_place": one.in_place,
                "temp_bytes": one.temp_bytes,
                "floor_bytes": floors.decode_bytes(
                    variant.config.architecture,
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
                "retrieval_heads": variant.config.retrieval_counts,
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
