"""Cost of decoding one token: full caches, split ones, and other libraries.

    python -m benchmarks.decode

A Llama of random weights with the attention of a published model decodes one token after another
from a context of random keys and values. All splits of the model are timed in turn, in one process;
beside each stands the time of its attention part (a model of the same attention and width 2), the
bytes of its live cache, and the ratio of the bytes that a step has to read at least. transformers
and kvpress follow at every context, on the same saved weights (see benchmarks.serving.rivals).

A second table has one split with the cache in every format; its ratios are against the same split
in the model's own dtype.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tqdm import tqdm

from benchmarks import command
from benchmarks.serving import floors, report, shapes, sweep, timing, variants
from benchmarks.serving.decode_parts import StepAndAttention
from benchmarks.serving.flags import ServingFlags
from benchmarks.serving.rivals import Rival, RivalError
from benchmarks.serving.variants import Variant
from duo_jax import files
from duo_jax.cache import KVFormat, cache_bytes, live_bytes
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.reports import machine

_WARMUP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeFlags(ServingFlags):
    """Flags of the benchmark."""

    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Tokens in the cache when decoding begins."""
    steps: int = 16
    """Timed steps of every program and context; the median counts."""
    rival_steps: int = 6
    """Timed steps of other libraries."""
    tables: tuple[Literal["splits", "kv"], ...] = ("splits", "kv")
    """Tables to measure: splits and other libraries, formats of the cache."""
    kv: tuple[KVFormat, ...] = ("bf16", "int8", "int4", "int2")
    """Formats of the cache, beside the model's own."""
    kv_contexts: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens in the cache for the table of formats."""
    kv_geometry: shapes.Geometry = "gqa"
    """Attention for the table of formats."""
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


def main(flags: DecodeFlags) -> None:
    """Measure, print tables, write them, JSON and pictures."""
    files.make_folder(flags.out.parent)
    extra = {"read_bandwidth": machine.read_bandwidth}
    if "splits" in flags.tables:
        rows_of = functools.partial(_splits, flags)
        result = sweep.measure(flags, rows_of, module="benchmarks.decode", extra=extra)
        sweep.publish(result, flags.out, report.DECODE)
    if "kv" in flags.tables:
        only = dataclasses.replace(flags, geometries=(flags.kv_geometry,), rivals=())
        rows_of = functools.partial(_formats, flags)
        result = sweep.measure(only, rows_of, module="benchmarks.decode", extra=extra)
        out = flags.out.with_name(f"{flags.out.name}_kv")
        sweep.publish(result, out, report.DECODE_KV)


def _splits(
    flags: DecodeFlags,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model: its splits, and other libraries."""
    splits, measure = flags.variants(model), _Model(flags, model, folder)
    for context in tqdm(flags.contexts, desc=geometry, disable=None):
        full, *others = measure.rows([(variant, "model") for variant in splits], context)
        rows = [_compared(row, full) for row in (full, *others)]
        for row in (row for rival in libraries for row in _theirs(flags, context, splits, rival)):
            if "ms" in row:
                row["speedup"] = full["ms"]["median"] / row["ms"]["median"]
            rows.append(row)
        for row in rows:
            yield {"geometry": geometry, "context": context, **row}


def _formats(
    flags: DecodeFlags,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model, its cache in every format."""
    del libraries
    full, duo, *_ = flags.variants(model)
    kinds: list[tuple[Variant, KVFormat]] = [(full, "model"), (duo, "model")]
    kinds.extend((duo, kv) for kv in flags.kv)
    measure = _Model(flags, model, folder)
    for context in tqdm(flags.kv_contexts, desc=f"{geometry}, KV", disable=None):
        rows = measure.rows(kinds, context)
        own = {row["name"]: row for row in rows if row["kv"] == "model"}
        for row in rows:
            row = _compared(row, own[row["name"]])
            row["floor"] = row.pop("floor_step_speedup")
            row["attention_floor"] = row.pop("floor_attention_speedup")
            yield {"geometry": geometry, "context": context, **row}


class _Model:
    """The parameters of one model, which all of its splits share."""

    def __init__(self, flags: DecodeFlags, model: ModelConfig, folder: pathlib.Path) -> None:
        self._flags = flags
        self._params = variants.load_params(folder, model)
        self._attention_params = variants.attention_params(model, flags.dtype)

    def rows(self, kinds: Sequence[tuple[Variant, KVFormat]], context: int) -> list[dict[str, Any]]:
        """Time splits and formats of the cache in turn at one context; return a row for each."""
        steps, dtype = self._flags.steps, self._flags.dtype
        max_len = context + 2 * (1 + steps)  # two programs decode into each cache
        measured = [
            StepAndAttention(
                variant.config,
                self._params,
                self._attention_params,
                context=context,
                max_len=max_len,
                dtype=dtype,
                kv=kv,
            )
            for variant, kv in kinds
        ]
        calls = {
            f"{part} {i}": call
            for i, one in enumerate(measured)
            for part, call in (("step", one.step), ("attention", one.attention))
        }
        for call in calls.values():
            call()
        # One step at a time: so gigabytes of weights pass between two steps of an attention part,
        # which finds its cache in main memory then, as it does within a whole step.
        seconds = timing.interleaved(calls, rounds=steps)
        return [
            {
                "name": variant.name,
                "kv": kv,
                "library": "duo_jax",
                "retrieval": variant.retrieval,
                "retrieval_heads": variant.config.retrieval_counts,
                "ms": timing.summary(seconds[f"step {i}"], scale=1e3),
                "attention_ms": timing.summary(seconds[f"attention {i}"], scale=1e3),
                "cache_bytes": live_bytes(measured[i].cache),
                "cache_bytes_formula": cache_bytes(
                    variant.config, batch_size=1, max_len=max_len, dtype=dtype, kv=kv
                ),
                "in_place": measured[i].in_place,
                "temp_bytes": measured[i].temp_bytes,
                "floor_bytes": floors.decode_bytes(
                    variant.config, context=context, dtype=dtype, kv=kv
                ),
            }
            for i, (variant, kv) in enumerate(kinds)
        ]


def _compared(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its speed-ups against another one, and the floors of both."""
    floors = {
        f"floor_{part}_speedup": base["floor_bytes"][part] / row["floor_bytes"][part]
        for part in ("step", "attention")
    }
    return {
        **row,
        "speedup": base["ms"]["median"] / row["ms"]["median"],
        "attention_speedup": base["attention_ms"]["median"] / row["attention_ms"]["median"],
        **floors,
    }


def _theirs(
    flags: DecodeFlags, context: int, splits: list[Variant], rival: Rival
) -> Iterator[dict[str, Any]]:
    """Measure a library at one context."""
    common = {"context": context, "warmup": _WARMUP, "steps": flags.rival_steps}
    if rival.library == "transformers":
        requests = {
            f"transformers, {cache}": {"cache": cache} for cache in ("DynamicCache", "StaticCache")
        }
    else:
        requests = {
            f"kvpress {variant.retrieval:.0%}": {
                "retrieval_heads": variant.config.retrieval_counts,
                "sink": flags.sink,
                "recent": flags.recent,
            }
            for variant in splits[1:]
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
    command.run(main, DecodeFlags)
