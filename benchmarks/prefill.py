"""Cost of reading a prompt: full caches, split ones, and other libraries.

    python -m benchmarks.prefill

A Llama of random weights with the attention of a published model, and a narrow rest, reads prompts
of random tokens in chunks. All splits are timed in turn, in one process; beside each stands the
ratio of the operations that are needed at least. transformers and kvpress follow at every length,
on the same saved weights (see benchmarks.serving.rivals).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import command
from benchmarks.serving import floors, report, sweep, timing, variants
from benchmarks.serving.flags import ServingFlags
from benchmarks.serving.rivals import Rival, RivalError
from benchmarks.serving.variants import Reader, Variant
from duo_jax import files
from duo_jax.cache import live_bytes
from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.serve import PrefillMode
from duo_jax.session.runtime import Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillFlags(ServingFlags):
    """Flags of the benchmark."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens of the prompt."""
    layers: int = 1
    """Decoder layers; the published models have 32. The vocabulary shrinks with them."""
    embed: int = 1024
    """Model width; the published models have 4,096. The MLP shrinks with it. At a quarter of the
    width, attention at 16K tokens has the share of the operations that it has there at 130K (mha)
    and 160K (gqa)."""
    chunk: int = Runtime.prefill_chunk
    """Tokens read at once."""
    mode: PrefillMode = "exact"
    """What streaming heads see of their chunk."""
    rounds: int = 3
    """Timed runs of every split and length; the median counts."""
    rival_rounds: int = 2
    """Timed runs of other libraries."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/prefill")
    """Where to write .json, .md and .png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.rounds, self.rival_rounds, self.chunk, *self.lengths) < 1:
            raise InputError("lengths, chunk and rounds must be at least 1")


def main(flags: PrefillFlags) -> None:
    """Measure, print a table, write it, JSON and a picture."""
    files.make_folder(flags.out.parent)
    rows_of = functools.partial(_rows, flags)
    result = sweep.measure(flags, rows_of, module="benchmarks.prefill", extra={})
    sweep.publish(result, flags.out, report.PREFILL)


def _rows(
    flags: PrefillFlags,
    geometry: str,
    model: ModelConfig,
    folder: pathlib.Path,
    libraries: list[Rival],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model."""
    params, splits = variants.load_params(folder, model), flags.variants(model)
    for length in tqdm(flags.lengths, desc=geometry, disable=None):
        rows = _ours(flags, length, splits, params)
        rows += [row for rival in libraries for row in _theirs(flags, length, splits, rival)]
        for row in rows:
            if "seconds" in row:
                row["speedup"] = rows[0]["seconds"]["median"] / row["seconds"]["median"]
            yield {"geometry": geometry, "length": length, **row}


def _ours(
    flags: PrefillFlags, length: int, splits: list[Variant], params: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure all splits at one length."""
    vocab_size = splits[0].config.architecture.vocab_size
    tokens = np.random.default_rng(length).integers(0, vocab_size, length, np.int32)
    readers = {
        variant.name: Reader(
            variant.config,
            params,
            tokens,
            chunk=flags.chunk,
            mode=flags.mode,
            dtype=flags.dtype,
        )
        for variant in splits
    }
    # Programs are compiled before; a run to warm up would cost as much as a round. The median of
    # three does not mind a slow first one.
    calls = {name: reader.read for name, reader in readers.items()}
    seconds = timing.interleaved(calls, rounds=flags.rounds)
    rows = [
        {
            "name": variant.name,
            "library": "duo_jax",
            "retrieval": variant.retrieval,
            "retrieval_heads": variant.config.retrieval_counts,
            "seconds": timing.summary(seconds[variant.name]),
            "cache_bytes": live_bytes(readers[variant.name].cache),
            "temp_bytes": readers[variant.name].temp_bytes,
            "floor_flops": floors.prefill_flops(variant.config, length=length),
        }
        for variant in splits
    ]
    for row in rows:
        row["floor_speedup"] = rows[0]["floor_flops"]["all"] / row["floor_flops"]["all"]
    return rows


def _theirs(
    flags: PrefillFlags, length: int, splits: list[Variant], rival: Rival
) -> Iterator[dict[str, Any]]:
    """Measure a library at one length."""
    requests: dict[str, dict[str, Any]] = {"transformers, DynamicCache": {}}
    if rival.library == "kvpress":
        requests = {
            f"kvpress {variant.retrieval:.0%}": {
                "retrieval_heads": variant.config.retrieval_counts,
                "sink": flags.sink,
                "recent": flags.recent,
            }
            for variant in splits[1:2]  # it reads a prompt alike for every split
        }
    for name, request in requests.items():
        try:
            answers = [
                rival.measure("prefill", length=length, **request)
                for _ in range(flags.rival_rounds)
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
    command.run(main, PrefillFlags)
