"""The stage that decodes with whole models: milliseconds per token, full and split.

A model's caches are made once, for the longest context that fits, and filled with random numbers;
shorter contexts are decoded in the same caches, since a step reads filled slots only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import floors, serving, timing
from benchmarks.gpu import memory, models
from benchmarks.gpu.models import Published
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table
from benchmarks.serving import Variant
from duo_jax.cache import cache_bytes, cache_shapes
from kernels.aot import COMPILER_OPTIONS


def run(settings: Settings, table: Table) -> None:
    """Measure all models at their headline contexts, then at the others."""
    table.notes = {
        "implementation": settings.implementation,
        "caches": "filled with random numbers; weights random",
        "memory": "of the longest context of its program: caches are made for that one",
        "timing": f"median of {settings.decode_rounds} rounds of {settings.decode_steps} tokens, "
        "dispatched one after the other",
    }
    for name, published in table.in_time((model.name, model) for model in settings.models):
        table.attempt(name, functools.partial(_model, settings, published, table))
        _compare(table, published)
    for name, published in table.in_time(
        (f"{model.name}, duo only", model) for model in settings.models if model.duo_contexts
    ):
        measure = functools.partial(_model, settings, published, table, duo_only=True)
        table.attempt(name, measure)
    table.write()


def _model(settings: Settings, published: Published, table: Table, *, duo_only=False) -> None:
    params = models.random_params(published.model, settings.dtype)
    jax.block_until_ready(params)
    variants = published.variants[:1] if duo_only else published.variants
    contexts = published.duo_contexts if duo_only else published.contexts
    for name, variant in table.in_time((f"{published.name} {v.name}", v) for v in variants):
        measure = functools.partial(_variant, settings, published, variant, contexts, params, table)
        table.attempt(name, measure)


def _variant(
    settings: Settings,
    published: Published,
    variant: Variant,
    contexts: tuple[int, ...],
    params: dict[str, Any],
    table: Table,
) -> None:
    """Add the rows of one way to split a model."""
    config = variant.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def size(context: int) -> int:
        length = context + settings.slots
        return cache_bytes(config, batch_size=1, max_len=length, dtype=settings.dtype)

    fitting = [context for context in contexts if memory.fits(weights + size(context))]
    for context in contexts:
        if context not in fitting:
            needed, limit = (weights + size(context)) / 1e9, (memory.limit() or 0) / 1e9
            table.not_reached.append(
                f"{published.name} {variant.name} at {context:,}: needs {needed:.1f} GB of "
                f"{limit:.1f} GB"
            )
    if not fitting:
        return
    max_len = max(fitting) + settings.slots
    empty = cache_shapes(config, batch_size=1, max_len=max_len, dtype=settings.dtype)
    decoder = serving.Decoder(
        config,
        params,
        empty,
        implementation=settings.implementation,
        compiler_options=COMPILER_OPTIONS,
    )
    watch = memory.Watch()
    cache = serving.filled_cache(
        config, context=max(fitting), max_len=max_len, dtype=settings.dtype
    )

    def steps() -> None:
        nonlocal cache
        cache = decoder.step(cache, tokens=settings.decode_steps)

    for _, context in table.in_time(
        (f"{published.name} {variant.name} at {context:,}", context) for context in fitting
    ):
        cache = dataclasses.replace(cache, lengths=jnp.array([context], jnp.int32))
        cache = decoder.step(cache, tokens=2)
        seconds = timing.interleaved({"steps": steps}, rounds=settings.decode_rounds)["steps"]
        floor = floors.decode_bytes(
            config.model,
            config.retrieval_heads,
            context=context,
            ring_slots=config.ring_slots,
            itemsize=jnp.dtype(settings.dtype).itemsize,
        )
        row = {
            "model": published.name,
            "name": variant.name,
            "context": context,
            "ms": timing.summary(seconds, scale=1e3 / settings.decode_steps),
            "floor_bytes": floor["step"],
            "retrieval": variant.retrieval,
            "sink": config.sink_size,
            "recent": config.recent_size,
            "cache_bytes": size(context),
        }
        row["bytes_per_second"] = 1e3 * floor["step"] / row["ms"]["median"]
        if context == max(fitting):
            row["memory"] = watch.report(temp_bytes=decoder.temp_bytes)
        table.add(**row)


def _compare(table: Table, published: Published) -> None:
    """Put the speed-up, its floor and the published number beside the split model's rows."""
    rows = [row for row in table.rows if row.get("model") == published.name]
    full = {row["context"]: row for row in rows if row["name"] == "full"}
    for row in rows:
        context = row["context"]
        ms = published.decode_ms.get(context)
        if ms is not None:
            row["published_a100_ms"] = ms[row["name"] == "duo"]
        if row["name"] == "full" or context not in full:
            continue
        row["speedup"] = full[context]["ms"]["median"] / row["ms"]["median"]
        row["floor_speedup"] = full[context]["floor_bytes"] / row["floor_bytes"]
        if context == published.contexts[0]:
            row["published_speedup"] = published.decode_speedup
        elif ms is not None:
            row["published_speedup"] = ms[0] / ms[1]
        if "memory" in row and "memory" in full[context]:
            row["memory_ratio"] = full[context]["memory"]["bytes"] / row["memory"]["bytes"]
    table.write()
