"""Whole prompts read by whole models, chunk by chunk: seconds, full and split.

Every prompt is read from its first to its last token; nothing is extrapolated.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gpu import memory, models
from benchmarks.gpu.models import Published
from benchmarks.gpu.program import Program
from benchmarks.gpu.tables import Table
from benchmarks.serving import floors, timing, variants
from kernels.aot import COMPILER_OPTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Program):
    """The reading of the model's prompt."""

    @property
    def name(self) -> str:
        return f"{self.published.name} {self.variant.name}, prefill of {self.published.prompt:,}"

    @property
    def max_len(self) -> int:
        return self.published.prompt

    def floor(self) -> float:
        """Return the operations that the prompt takes at least, 2 per multiply-add."""
        return floors.prefill_flops(self.variant.config, length=self.published.prompt)["all"]

    def expected_seconds(self, table: Table) -> float:
        """Return the time at the rate of the slowest prompt so far."""
        rates = [row["flops_per_second"] for row in table.rows if "flops_per_second" in row]
        return self.floor() / min(rates or [self.settings.flops_per_second])

    def compile(self) -> variants.Reader:
        model = self.published.architecture
        tokens = np.random.default_rng(0).integers(
            0, model.vocab_size, self.published.prompt, np.int32
        )
        return variants.Reader(
            self.variant.config,
            models.param_shapes(model, self.settings.dtype),
            tokens,
            chunk=self.published.chunk,
            mode=self.settings.mode,
            dtype=self.settings.dtype,
            implementation=self.settings.implementation,
            compiler_options=COMPILER_OPTIONS,
        )

    def measure(self, compiled: variants.Reader, params: dict[str, Any], table: Table) -> None:
        """Add the row; a prompt that takes little of the time is read up to three times."""
        watch = memory.Watch()
        compiled.params = params
        seconds = timing.interleaved({"read": compiled.read}, rounds=1)["read"]
        while sum(seconds) < min(8.0, table.time_left / 4) and len(seconds) < 3:
            seconds += timing.interleaved({"read": compiled.read}, rounds=1)["read"]
        time, flops = timing.summary(seconds), self.floor()
        table.add(
            what=models.PREFILL,
            model=self.published.name,
            name=self.variant.name,
            length=self.published.prompt,
            chunk=self.published.chunk,
            mode=self.settings.mode,
            sink=self.variant.config.sink_size,
            recent=self.variant.config.recent_size,
            retrieval=self.variant.retrieval,
            seconds=time,
            floor_flops=flops,
            flops_per_second=flops / time["median"],
            memory=watch.report(temp_bytes=compiled.temp_bytes),
        )


def compare(published: Published, rows: Sequence[dict[str, Any]]) -> None:
    """Put the speed-up, its floor and the published number beside the split model's row."""
    by_name = {row["name"]: row for row in rows}
    if published.prefill_seconds is not None:
        for name, seconds in zip(("full", "duo"), published.prefill_seconds, strict=True):
            if name in by_name:
                by_name[name]["published_a100_seconds"] = seconds
    if {"duo", "full"} <= by_name.keys():
        duo, full = by_name["duo"], by_name["full"]
        duo["speedup"] = full["seconds"]["median"] / duo["seconds"]["median"]
        duo["floor_speedup"] = full["floor_flops"] / duo["floor_flops"]
        duo["published_speedup"] = published.prefill_speedup
        memory.compare(duo, full)
