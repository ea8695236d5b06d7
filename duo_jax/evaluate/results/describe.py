"""The settings that every result repeats: model, split, formats, hardware, versions."""

from typing import Any

from duo_jax.api import DuoModel
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.reports import machine

_FORMATS = {"weights": "weights", "kv": "caches"}


def settings(flags: ModelFlags, model: DuoModel) -> dict[str, Any]:
    """Return what a JSON result says of the model, as it was loaded by these flags.

    "retrieval_heads" are counted per layer; "sparsity" is the split's own, which may differ from
    the flag's, as heads are whole.
    """
    config, runtime = model.config, model.runtime
    return {
        **machine.environment(),
        "model": flags.model,
        "pattern": flags.pattern or "the model's own",
        "retrieval_heads": config.retrieval_counts,
        "kv_heads": config.architecture.num_kv_heads,
        "sparsity": sparsity(model),
        "sink": config.sink_size,
        "recent": config.recent_size,
        "dtype": str(runtime.dtype),
        "weights": runtime.weight_format,
        "kv": runtime.kv_format,
        "prefill_mode": runtime.prefill_mode,
        "prefill_chunk": runtime.prefill_chunk,
        "implementation": runtime.implementation,
        **({"keep": runtime.keep, "keep_by": runtime.keep_by} if runtime.keep < 1 else {}),
    }


def sparsity(model: DuoModel) -> float:
    """Return the fraction of a model's KV heads that stream."""
    config = model.config
    heads = config.architecture.num_layers * config.architecture.num_kv_heads
    return 1 - config.num_retrieval_heads / heads


def in_words(result: dict[str, Any]) -> str:
    """Return the settings of a result in one line, for titles and captions."""
    smaller = [
        f"{result[name]} {words}"
        for name, words in _FORMATS.items()
        if result.get(name, "model") != "model"
    ]
    if "keep" in result:
        smaller.append(f"{100 * result['keep']:g}% of tokens kept by {result['keep_by']}")
    parts = [
        f"sink {result['sink']}, recent {result['recent']}",
        ", ".join([result["dtype"], *smaller]),
        f"chunks of {result['prefill_chunk']:,}, mode {result['prefill_mode']}",
    ]
    return "; ".join(parts)
