"""Rows of benchmarks.decode: one split of a model, its cache in every format."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.serving import floors, timing
from benchmarks.serving.decode_parts import StepAndAttention
from benchmarks.serving.variants import Variant
from duo_jax.cache import KVFormat, cache_bytes, live_bytes


def rows(
    settings: list[tuple[Variant, KVFormat]],
    params: dict[str, Any],
    attention_params: dict[str, Any],
    *,
    context: int,
    steps: int,
    dtype: DTypeLike,
) -> list[dict[str, Any]]:
    """Time all settings in turn at one context.

    Args:
      settings: splits and formats; ratios are against the same split in the format "model".
      params: of the model, in the serving form that all splits share.
      attention_params: of its attention part.
      context: tokens in the cache when decoding begins.
      steps: timed steps of each.
      dtype: of parameters and activations.

    Returns:
      A row per setting. "floor" is the ratio of the bytes that a step has to read, of which the
      weights do not change; "attention_floor" that of the cache alone.
    """
    max_len = context + 2 * (1 + steps)  # two programs decode into each cache
    measured = {
        _name(variant, kv): StepAndAttention(
            variant.config,
            params,
            attention_params,
            context=context,
            max_len=max_len,
            dtype=dtype,
            kv=kv,
        )
        for variant, kv in settings
    }
    calls = {
        f"{name} {part}": call
        for name, one in measured.items()
        for part, call in (("step", one.step), ("attention", one.attention))
    }
    for call in calls.values():
        call()
    seconds = timing.interleaved(calls, rounds=steps)

    found = {}
    for variant, kv in settings:
        name, config = _name(variant, kv), variant.config
        kept = cache_bytes(config, batch_size=1, max_len=context, dtype=dtype, kv=kv)
        weights = floors.weight_bytes(config.architecture, itemsize=jnp.dtype(dtype).itemsize)
        row = {
            "name": variant.name,
            "kv": kv,
            "retrieval_heads": config.retrieval_counts,
            "ms": timing.summary(seconds[f"{name} step"], scale=1e3),
            "attention_ms": timing.summary(seconds[f"{name} attention"], scale=1e3),
            "cache_bytes": live_bytes(measured[name].cache),
            "floor_bytes": {"step": weights + kept, "attention": kept},
            "in_place": measured[name].in_place,
            "temp_bytes": measured[name].temp_bytes,
        }
        own = found.setdefault(variant.name, row)  # the format "model" comes first
        row["speedup"] = own["ms"]["median"] / row["ms"]["median"]
        row["attention_speedup"] = own["attention_ms"]["median"] / row["attention_ms"]["median"]
        for part, key in (("step", "floor"), ("attention", "attention_floor")):
            row[key] = own["floor_bytes"][part] / row["floor_bytes"][part]
        found[name] = row
    return [found[_name(variant, kv)] for variant, kv in settings]


def _name(variant: Variant, kv: KVFormat) -> str:
    return f"{variant.name}, {kv}"
