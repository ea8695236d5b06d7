"""Speed and memory of a real model on this machine, beside what a user would pick.

    python -m benchmarks.real_speed

A prompt of Python's language reference is read and continued greedily: by this project with full
caches, with half of its KV heads streaming, and with quantised weights; by transformers, with a
cache that grows and one of a fixed size; and by llama.cpp on the same GGUF file. Each runs in a
process of its own (benchmarks.contenders) with as many threads as there are cores; they take turns.
llama-cpp-python has an environment of its own, which is compiled for this machine:

    python3 -m venv .venv-llama-cpp
    .venv-llama-cpp/bin/pip install llama-cpp-python
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from tqdm import tqdm

from benchmarks import command
from benchmarks.contenders.report import REPORT
from benchmarks.serving import rivals, sweep, timing
from benchmarks.serving.rivals import Rival, RivalError
from convert import fetch
from duo_jax import files
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents
from duo_jax.errors import InputError
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.reports import machine
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Fraction, Size
from duo_jax.session.tokenization import load_tokenization

FULL = "full"
# Of the bandwidth of a copy. A library that reads its weights more slowly than this is broken on
# this machine, and a ratio to it says nothing (torch has been seen at 0.7 GB/s on an AMD machine).
ABSURD = 0.1

Other = Literal["transformers", "llama.cpp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealSpeedFlags:
    """Flags of the benchmark."""

    model: str | None = None
    """A GGUF file, or a Hugging Face folder, which llama.cpp does not read. Default: SmolLM2-135M
    in 4 bits, which is fetched as python -m convert.fetch does."""
    lengths: tuple[Count, ...] = (1024, 8128)
    """Tokens of the prompt."""
    new_tokens: Count = 64
    """Tokens to write after it; the first one counts as the prompt's."""
    rounds: Count = 3
    """Timed runs of each; the median counts."""
    pattern: pathlib.Path | None = None
    """Pattern of the split model. Default: heads at random, which cost what others cost."""
    sparsity: Fraction = 0.5
    """Fraction of streaming heads."""
    sink: Size = 16
    """Sinks of the streaming heads."""
    recent: Count = 256
    """Recent tokens of the streaming heads."""
    weights: tuple[WeightFormat, ...] = ()
    """Formats of weights to measure beside the model's own, with full caches."""
    others: tuple[Other, ...] = ("transformers", "llama.cpp")
    """Other programs to measure."""
    llama_cpp_python: pathlib.Path = pathlib.Path(".venv-llama-cpp/bin/python")
    """Interpreter that has llama-cpp-python."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/real_speed")
    """Where to write .json, .md and .png."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.lengths or self.new_tokens < 2:
            raise InputError("there must be lengths, and two new tokens or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A program to measure."""

    name: str
    module: str  # of benchmarks.contenders
    weights: str
    python: pathlib.Path
    settings: dict[str, Any]


def main(flags: RealSpeedFlags) -> None:
    """Measure, print a table, write it, JSON and a picture."""
    files.make_folder(flags.out.parent)
    sweep.publish(measure(flags), flags.out, REPORT)


def measure(flags: RealSpeedFlags) -> dict[str, Any]:
    """Run all contenders in turn.

    Raises:
      InputError: the model or the pattern cannot be used.
    """
    began, environment = time.monotonic(), machine.environment()
    model = pretrained.resolve(flags.model or fetch.fetch()).absolute()
    most = pretrained.load_config(model).max_positions
    if max(flags.lengths) + flags.new_tokens > most:
        raise InputError(
            f"{max(flags.lengths):,} tokens and {flags.new_tokens} new ones are too many for the "
            f"model's range of {most:,}"
        )
    copy_bandwidth = machine.copy_bandwidth()
    tokens = _prompt(model, max(flags.lengths))
    with contextlib.ExitStack() as stack:
        running, skipped = _start(stack, flags, model)
        rows = [
            row
            for length in tqdm(sorted(flags.lengths), desc="tokens", disable=None)
            for row in _rows(flags, running, tokens[:length], copy_bandwidth)
        ]
        versions = {rival.library: rival.versions for _, rival in running}
    skipped += [
        f"{row['name']} at {row['length']:,} tokens reads {row['gb_per_second']:.1f} GB/s where "
        f"this machine copies {copy_bandwidth / 1e9:.0f}: something is wrong with it here, and a "
        "ratio to it would mean nothing."
        for row in rows
        if row["absurd"]
    ]
    return {
        "command": machine.command("benchmarks.real_speed"),
        "settings": machine.to_json(flags) | {"dtype": "float32", "model": model.name},
        **environment,
        "threads": machine.cores(),
        "copy_bandwidth": copy_bandwidth,
        "versions": versions,
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "skipped": skipped,
        "rows": rows,
    }


def contenders(flags: RealSpeedFlags, model: pathlib.Path) -> list[Contender]:
    """Return what is to be measured, ours with full caches first."""
    threads, ours = {"threads": machine.cores()}, pathlib.Path(sys.executable)

    def duo(name: str, *, weights: str = "model", **split: Any) -> Contender:
        settings = {"model": str(model), "pattern": "none", "weights": weights, **split}
        shown = "float32" if weights == "model" else weights
        return Contender(name=name, module="duo", weights=shown, python=ours, settings=settings)

    split = {"pattern": "random" if flags.pattern is None else str(flags.pattern.absolute())}
    sizes = {"sparsity": flags.sparsity, "sink_size": flags.sink, "recent_size": flags.recent}
    found = [duo(FULL), duo(f"duo {1 - flags.sparsity:.0%}", **split, **sizes)]
    found += [duo(f"{FULL}, {weights}", weights=weights) for weights in flags.weights]
    if "transformers" in flags.others:
        found += [
            Contender(
                name=f"transformers, {cache}",
                module="eager",
                weights="float32",
                python=ours,
                settings={"model": str(model), "cache": cache, **threads},
            )
            for cache in ("DynamicCache", "StaticCache")
        ]
    if "llama.cpp" in flags.others:
        found.append(
            Contender(
                name="llama.cpp",
                module="cpp",
                weights=model.stem.rpartition(".")[2],
                python=flags.llama_cpp_python.absolute(),
                settings={
                    "model": str(model),
                    "context": max(flags.lengths) + flags.new_tokens,
                    **threads,
                },
            )
        )
    return found


def _start(
    stack: contextlib.ExitStack, flags: RealSpeedFlags, model: pathlib.Path
) -> tuple[list[tuple[Contender, Rival]], list[str]]:
    """Start all; return those that run, and a line for each other program that does not."""
    running, skipped = [], []
    for contender in contenders(flags, model):
        try:
            running.append((contender, stack.enter_context(_started(contender))))
        except RivalError as error:
            if contender.module == "duo":
                raise InputError(str(error)) from None
            skipped.append(f"{contender.name} is skipped: {error}")
    return running, skipped


def _started(contender: Contender) -> contextlib.AbstractContextManager[Rival]:
    """Start a contender's process."""
    if contender.module == "cpp" and not contender.python.is_file():
        raise RivalError(
            f"there is no {contender.python}; make it as python -m benchmarks.real_speed --help "
            "says, or pass --llama-cpp-python"
        )
    module = f"benchmarks.contenders.{contender.module}"
    words = [str(contender.python), "-m", module, json.dumps(contender.settings)]
    return rivals.started(contender.name, words)


def _prompt(model: pathlib.Path, length: int) -> list[int]:
    """Return tokens of the built-in text.

    Raises:
      InputError: it has fewer.
    """
    text = "\n\n".join(load_documents(()))[: 16 * length]
    tokens = load_tokenization(model).encode(text)
    if len(tokens) < length:
        raise InputError(f"the built-in text has {len(tokens):,} tokens, not {length:,}")
    return tokens[:length]


def _rows(
    flags: RealSpeedFlags,
    running: Sequence[tuple[Contender, Rival]],
    tokens: list[int],
    copy_bandwidth: float,
) -> list[dict[str, Any]]:
    """Return a row for each contender at one length."""
    request = {"tokens": tokens, "count": flags.new_tokens}
    loaded = [rival.measure("warm_up", **request)["peak_bytes"] for _, rival in running]
    answers: list[list[dict[str, Any]]] = [[] for _ in running]
    for _ in range(flags.rounds):
        for (_, rival), mine in zip(running, answers, strict=True):
            mine.append(rival.measure("generate", **request))
    of_all = zip(running, answers, loaded, strict=True)
    rows = [
        {
            "length": len(tokens),
            "name": contender.name,
            "weights": contender.weights,
            "start_peak_bytes": peak,
            "same_tokens": _agreement(mine[0]["tokens"], answers[0][0]["tokens"]),
            **_speeds(mine, len(tokens), steps=flags.new_tokens - 1),
        }
        for (contender, _), mine, peak in of_all
    ]
    for row, (contender, _) in zip(rows, running, strict=True):
        slowest = ABSURD * copy_bandwidth / 1e9
        row["absurd"] = contender.module != "duo" and row["gb_per_second"] < slowest
        if not row["absurd"]:
            for part in ("prefill", "decode"):
                row[f"{part}_ratio"] = row[part]["median"] / rows[0][part]["median"]
    return rows


def _speeds(runs: list[dict[str, Any]], length: int, *, steps: int) -> dict[str, Any]:
    """Return what the runs of one contender give, in tokens and bytes per second."""
    decode = timing.summary([steps / run["decode_seconds"] for run in runs])
    return {
        "prefill": timing.summary([length / run["prefill_seconds"] for run in runs]),
        "decode": decode,
        "step_bytes": runs[0]["step_bytes"],
        "gb_per_second": runs[0]["step_bytes"] * decode["median"] / 1e9,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def _agreement(tokens: list[int], others: list[int]) -> int:
    """Return with how many equal tokens two texts begin."""
    pairs = zip(tokens, others, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    command.run(main, RealSpeedFlags)
