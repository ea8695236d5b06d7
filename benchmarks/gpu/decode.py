"""Decoding with whole models: milliseconds per token, full and split.

A program's caches are made once, for the longest of its contexts, and filled with random numbers;
shorter contexts are decoded in the same caches, since a step reads filled slots only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu import memory, models
from benchmarks.gpu.models import Published
from benchmarks.gpu.program import Program
from benchmarks.gpu.tables import Table
from benchmarks.serving import floors, timing, variants
from duo_jax.cache import cache_shapes, with_lengths
from kernels.aot import COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Program):
    """Decoding at some contexts."""

    contexts: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.published.name} {self.variant.name}, decode at {max(self.contexts):,}"

    @property
    def max_len(self) -> int:
        return max(self.contexts) + self.settings.slots

    def floor(self) -> float:
        return self._floor_bytes(max(self.contexts))

    def expected_seconds(self, table: Table) -> float:
        del table
        steps = 2 + self.settings.decode_steps * self.settings.decode_rounds
        read = sum(self._floor_bytes(context) for context in self.contexts)
        return steps * read / self.settings.bytes_per_second

    def compile(self) -> variants.Decoder:
        empty = cache_shapes(
            self.variant.config, batch_size=1, max_len=self.max_len, dtype=self.settings.dtype
        )
        return variants.Decoder(
            self.variant.config,
            models.param_shapes(self.published.architecture, self.settings.dtype),
            empty,
            implementation=self.settings.implementation,
            compiler_options=COMPILER_OPTIONS,
        )

    def measure(self, compiled: variants.Decoder, params: dict[str, Any], table: Table) -> None:
        """Add a row per context."""
        settings, config = self.settings, self.variant.config
        watch = memory.Watch()
        compiled.params = params
        cache = variants.filled_cache(
            config, context=max(self.contexts), max_len=self.max_len, dtype=settings.dtype
        )

        def steps() -> None:
            nonlocal cache
            cache = compiled.step(cache, tokens=settings.decode_steps)

        for _, context in table.in_time((f"{self.name}: {n:,}", n) for n in self.contexts):
            cache = with_lengths(cache, jnp.array([context], jnp.int32))
            cache = compiled.step(cache, tokens=2)
            seconds = timing.interleaved({"steps": steps}, rounds=settings.decode_rounds)["steps"]
            row = {
                "what": models.DECODE,
                "model": self.published.name,
                "name": self.variant.name,
                "context": context,
                "ms": timing.summary(seconds, scale=1e3 / settings.decode_steps),
                "floor_bytes": self._floor_bytes(context),
                "retrieval": self.variant.retrieval,
                "sink": config.sink_size,
                "recent": config.recent_size,
                "cache_bytes": self.cache_bytes(context + settings.slots),
            }
            row["bytes_per_second"] = 1e3 * row["floor_bytes"] / row["ms"]["median"]
            if context == max(self.contexts):
                row["memory"] = watch.report(temp_bytes=compiled.temp_bytes)
            table.add(**row)

    def _floor_bytes(self, context: int) -> int:
        """Return the bytes that a step at `context` tokens must move."""
        return floors.decode_bytes(self.variant.config, context=context, dtype=self.settings.dtype)[
            "step"
        ]


def compare(published: Published, rows: Sequence[dict[str, Any]]) -> None:
    """Put the speed-up, its floor and the published number beside the split model's rows."""
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
        memory.compare(row, full[context])
