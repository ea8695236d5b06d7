"""The stage that reads whole prompts with whole models, chunk by chunk: seconds, full and split."""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks import floors, serving, timing
from benchmarks.gpu import memory, models
from benchmarks.gpu.models import Published
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table
from benchmarks.serving import Variant
from duo_jax.cache import cache_bytes
from kernels.aot import COMPILER_OPTIONS


def run(settings: Settings, table: Table) -> None:
    """Measure every model's prompt once from its first to its last token; nothing is extrapolated.

    A prompt that would not be read in the time left, at the rate of the slowest one so far, is not
    begun.
    """
    table.notes = {
        "implementation": settings.implementation,
        "mode": settings.mode,
        "prompts": "random tokens, read whole; weights random",
    }
    for name, published in table.in_time((model.name, model) for model in settings.models):
        table.attempt(name, functools.partial(_model, settings, published, table))
        _compare(table, published)


def _model(settings: Settings, published: Published, table: Table) -> None:
    params = models.random_params(published.model, settings.dtype)
    jax.block_until_ready(params)
    for variant in published.variants:
        name = f"{published.name} {variant.name}"
        measure = functools.partial(_variant, settings, published, variant, params, table, name)
        table.attempt(name, measure)


def _variant(
    settings: Settings,
    published: Published,
    variant: Variant,
    params: dict[str, Any],
    table: Table,
    name: str,
) -> None:
    config = variant.config
    flops = floors.prefill_flops(
        config.model,
        config.retrieval_heads,
        length=published.prompt,
        sink_size=config.sink_size,
        recent_size=config.recent_size,
    )["all"]
    rates = [row["flops_per_second"] for row in table.rows if "flops_per_second" in row]
    expected = flops / min(rates or [settings.flops_per_second])
    if expected > table.time_left:
        table.not_reached.append(
            f"{name}: about {expected:.0f} s, {max(0.0, table.time_left):.0f} s are left"
        )
        return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + cache_bytes(
        config, batch_size=1, max_len=published.prompt, dtype=settings.dtype
    )
    if not memory.fits(needed):
        table.not_reached.append(f"{name}: needs {needed / 1e9:.1f} GB")
        return
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, published.prompt, np.int32
    )
    reader = serving.Reader(
        config,
        params,
        tokens,
        chunk=published.chunk,
        mode=settings.mode,
        dtype=settings.dtype,
        implementation=settings.implementation,
        compiler_options=COMPILER_OPTIONS,
    )
    watch = memory.Watch()  # after compiling, which may have tried what takes memory
    seconds = timing.interleaved({"read": reader.read}, rounds=1)["read"]
    while sum(seconds) < min(8.0, table.time_left / 4) and len(seconds) < 3:
        seconds += timing.interleaved({"read": reader.read}, rounds=1)["read"]
    time = timing.summary(seconds)
    table.add(
        model=published.name,
        name=variant.name,
        length=published.prompt,
        chunk=published.chunk,
        mode=settings.mode,
        sink=config.sink_size,
        recent=config.recent_size,
        retrieval=variant.retrieval,
        seconds=time,
        floor_flops=flops,
        flops_per_second=flops / time["median"],
        memory=watch.report(temp_bytes=reader.temp_bytes),
    )


def _compare(table: Table, published: Published) -> None:
    rows = {row["name"]: row for row in table.rows if row.get("model") == published.name}
    if published.prefill_seconds is not None:
        for name, seconds in zip(("full", "duo"), published.prefill_seconds, strict=True):
            if name in rows:
                rows[name]["published_a100_seconds"] = seconds
    if {"duo", "full"} <= rows.keys():
        duo, full = rows["duo"], rows["full"]
        duo["speedup"] = full["seconds"]["median"] / duo["seconds"]["median"]
        duo["floor_speedup"] = full["floor_flops"] / duo["floor_flops"]
        duo["published_speedup"] = published.prefill_speedup
        duo["memory_ratio"] = full["memory"]["bytes"] / duo["memory"]["bytes"]
    table.write()
