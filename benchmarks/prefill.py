"""What reading a prompt costs with full caches, with split ones, and in other libraries.

    python -m benchmarks.prefill

A Llama of random weights with the attention of a published model, and a narrow rest, reads prompts
of random tokens in chunks. All splits are timed in turn, in one process; beside each stands the
ratio of the operations that are needed at least. transformers and kvpress follow at every length,
on the same saved weights (see benchmarks.rivals).
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from benchmarks import floors, machine, prefill_report, random_model, serving, shapes, timing
from benchmarks.rivals import KVPRESS_PYTHON, Rival, RivalError, running
from benchmarks.serving import Reader, Variant
from duo_jax import cli, files
from duo_jax.config import ModelConfig
from duo_jax.errors import InputError
from duo_jax.runtime import Runtime
from duo_jax.serve import PrefillMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Flags of the benchmark."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens of the prompt."""
    chunk: int = Runtime.prefill_chunk
    """Tokens read at once."""
    mode: PrefillMode = "exact"
    """What streaming heads see of their chunk."""
    geometries: tuple[shapes.Geometry, ...] = ("gqa", "mha")
    """Attention of Llama-3-8B (gqa: 32 query, 8 KV heads of 128) and Llama-2-7B (mha: 32, 32)."""
    layers: int = 1
    """Decoder layers; the published models have 32. The vocabulary shrinks with them."""
    embed: int = 1024
    """Model width; the MLP shrinks with it. The published models have 4,096; at a quarter of it
    attention weighs at 16K tokens what it weighs in them beyond 64K."""
    q_heads: int = 32
    """Query heads; fewer take KV heads along."""
    retrieval: tuple[float, ...] = (0.5, 0.25)
    """Fractions of retrieval heads."""
    sink: int = 128
    """Sinks of the streaming heads."""
    recent: int = 256
    """Recent tokens of the streaming heads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights, activations and caches."""
    rounds: int = 2
    """Timed runs of every split and length; the median counts."""
    rivals: tuple[Literal["transformers", "kvpress"], ...] = ("transformers", "kvpress")
    """Other libraries to measure."""
    rival_rounds: int = 1
    """Timed runs of theirs."""
    kvpress_python: pathlib.Path = KVPRESS_PYTHON
    """Interpreter of kvpress' own environment."""
    models: pathlib.Path = pathlib.Path("runs/benchmark-models")
    """Where random models are kept between runs (gigabytes)."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/prefill")
    """Where to write .json and .png."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.rival_rounds, self.chunk, *self.lengths) < 1:
            raise InputError("lengths, chunk and rounds must be at least 1")
        if not all(0 <= fraction < 1 for fraction in self.retrieval):
            raise InputError("fractions of retrieval heads lie in [0, 1)")


def main(config: PrefillConfig) -> None:
    """Measure, print a table, write JSON and a picture."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    environment = machine.environment()
    rows, skipped, versions = [], [], {}
    for geometry in config.geometries:
        model = shapes.model_config(
            geometry, layers=config.layers, embed=config.embed, q_heads=config.q_heads
        )
        folder = random_model.ensure_folder(model, config.models, dtype=config.dtype)
        with running(
            config.rivals, folder, dtype=config.dtype, kvpress_python=config.kvpress_python
        ) as (libraries, lines):
            skipped += [line for line in lines if line not in skipped]
            versions |= {rival.library: rival.versions for rival in libraries}
            for row in _sweep(config, geometry, model, folder, libraries):
                if "skipped" in row:
                    skipped.append(row["skipped"])
                else:
                    rows.append(row)
    result = {
        "command": "python -m benchmarks.prefill",
        "settings": machine.plain(config),
        **environment,
        "rival_versions": versions,
        "skipped": skipped,
        "rows": rows,
    }
    files.write_text(config.out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    prefill_report.plot(result, config.out.with_suffix(".png"))
    print(prefill_report.to_markdown(result))


def _sweep(
    config: PrefillConfig,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model."""
    params = serving.load_params(folder, model)
    variants = serving.variants(
        model, config.retrieval, sink_size=config.sink, recent_size=config.recent
    )
    for length in tqdm(config.lengths, desc=geometry, disable=None):
        rows = _ours(config, length, variants, params)
        rows += [row for rival in libraries for row in _theirs(config, length, variants, rival)]
        for row in rows:
            if "seconds" in row:
                row["speedup"] = rows[0]["seconds"]["median"] / row["seconds"]["median"]
            yield {"geometry": geometry, "length": length, **row}


def _ours(
    config: PrefillConfig, length: int, variants: list[Variant], params: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure all splits at one length."""
    vocab_size = variants[0].config.model.vocab_size
    tokens = np.random.default_rng(length).integers(0, vocab_size, length, np.int32)
    readers = {
        variant.name: Reader(
            variant.config,
            params,
            tokens,
            chunk=config.chunk,
            mode=config.mode,
            dtype=config.dtype,
        )
        for variant in variants
    }
    # Programs are compiled before; a run to warm up would cost as much as a round.
    calls = {name: reader.read for name, reader in readers.items()}
    seconds = timing.interleaved(calls, rounds=config.rounds)
    rows = [
        {
            "name": variant.name,
            "library": "duo_jax",
            "retrieval": variant.retrieval,
            "retrieval_heads": variant.config.retrieval_heads,
            "seconds": timing.summary(seconds[variant.name]),
            "cache_bytes": serving.live_bytes(readers[variant.name].cache),
            "temp_bytes": readers[variant.name].temp_bytes,
            "floor_flops": floors.prefill_flops(
                variant.config.model,
                variant.config.retrieval_heads,
                length=length,
                sink_size=config.sink,
                recent_size=config.recent,
            ),
        }
        for variant in variants
    ]
    for row in rows:
        row["floor_speedup"] = rows[0]["floor_flops"]["all"] / row["floor_flops"]["all"]
    return rows


def _theirs(
    config: PrefillConfig, length: int, variants: list[Variant], rival: Rival
) -> Iterator[dict[str, Any]]:
    """Measure a library at one length."""
    requests: dict[str, dict[str, Any]] = {"transformers, DynamicCache": {}}
    if rival.library == "kvpress":  # reads the prompt alike for every split
        variant = variants[1]
        heads = {"retrieval_heads": variant.config.retrieval_heads}
        requests = {
            f"kvpress {variant.retrieval:.0%}": heads
            | {"sink": config.sink, "recent": config.recent}
        }
    for name, request in requests.items():
        try:
            answers = [
                rival.measure("prefill", length=length, **request)
                for _ in range(config.rival_rounds)
            ]
        except RivalError as error:
            yield {"skipped": f"{name} at {length:,} tokens: {error}"}
            continue
        yield {
            "name": name,
            "library": rival.library,
            "seconds": timing.summary([answer["seconds"] for answer in answers]),
            "cache_bytes": answers[-1]["cache_bytes"],
        }


if __name__ == "__main__":
    cli.run(
        main,
        PrefillConfig,
        prog="python -m benchmarks.prefill",
        description=__doc__.split("\n\n")[0],
    )
