"""Servers under load: full against split caches in the same memory, and transformers serve.

    python -m benchmarks.serving_load --model FOLDER --pattern FOLDER

Every server runs in a process of its own, one after another, on the same weights, and answers the
same streamed requests: texts that begin with the same words (a system prompt, a document), then go
on differently. Each number of clients first asks once for itself, so that programs are compiled,
with texts that begin otherwise. Our servers get caches of the same bytes.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from tqdm import tqdm

from benchmarks import command
from benchmarks.serving import load, servers
from benchmarks.serving.load import Load, LoadError
from duo_jax import api, files
from duo_jax.data.documents import load_documents
from duo_jax.engine import Engine, Request
from duo_jax.engine.sizes import bytes_of
from duo_jax.errors import InputError
from duo_jax.reports import machine, markdown
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count, Fraction

FULL, SPLIT, COLD, OTHER = "full", "split", "split, no prefix reuse", "transformers serve"
_PAGE = 64
_SNAPSHOTS = 16
_ANSWER = 256  # tokens of a request that is to fit; none ends before the last one has begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingLoadFlags:
    """Flags of the benchmark."""

    model: str
    """A Hugging Face folder; transformers reads it too."""
    pattern: str | None = None
    """Pattern of the split model. Default: the model's own."""
    sparsity: Fraction = 0.5
    """Fraction of streaming heads."""
    clients: tuple[Count, ...] = (1, 4, 16)
    """Clients that ask at the same time."""
    requests: Count = 16
    """Requests for each number of clients."""
    common: Count = 1500
    """Characters that all texts begin with."""
    own: Count = 500
    """Characters of each text that differ."""
    new_tokens: Count = 32
    """Tokens of an answer."""
    cache_mb: Count = 400
    """Megabytes (1e6) of our servers' caches."""
    fit_tokens: Count = 4096
    """Tokens of each request of those that are to fit at once, at most the model's range."""
    fit_mb: Count = 1000
    """Megabytes of caches that they are to fit into."""
    others: bool = True
    """Measure transformers serve too."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/serving_load")
    """Where to write .json and .md."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(flags: ServingLoadFlags) -> None:
    """Measure all servers, write the results, print the tables.

    Raises:
      InputError: the model or its pattern cannot be used.
    """
    environment = machine.environment()
    split = api.load(flags.model, pattern=flags.pattern, sparsity=flags.sparsity)
    models = {FULL: api.load(flags.model, pattern="none"), SPLIT: split}
    tokens = {name: _cache_tokens(model, flags) for name, model in models.items()}
    fit = {name: _fit_at_once(model, flags) for name, model in models.items()}
    pattern = [] if flags.pattern is None else ["--pattern", flags.pattern]
    some = ["--sparsity", str(flags.sparsity), *pattern]
    ours = {
        FULL: (FULL, ["--pattern", "none"]),
        SPLIT: (SPLIT, some),
        COLD: (SPLIT, [*some, "--no-prefix-reuse"]),
    }
    results: dict[str, Any] = {}
    names = [*ours, *([OTHER] if flags.others else [])]
    for name in tqdm(names, desc="servers", disable=None):
        port = servers.free_port()
        if name == OTHER:
            words = servers.transformers_command(flags.model, port, ["--dtype", "float32"])
            called = flags.model
        else:
            kind, own = ours[name]
            sizes = ["--cache-tokens", str(tokens[kind]), "--snapshots", str(_SNAPSHOTS)]
            sizes += ["--max-requests", str(max(flags.clients))]
            words, called = servers.duo_command(flags.model, port, [*own, *sizes]), "model"
        try:
            with servers.running(words, port):
                found = [_measure(port, called, clients, flags) for clients in flags.clients]
                results[name] = [dataclasses.asdict(one) for one in found]
        except LoadError as error:
            print(f"{name}: {error}", file=sys.stderr)
            results[name] = str(error)
    result = {
        "flags": machine.to_json(flags),
        **environment,
        "dtype": str(split.runtime.dtype),
        "sink": split.config.sink_size,
        "recent": split.config.recent_size,
        "cache_tokens": tokens,
        "fit_at_once": fit,
        "loads": results,
        "command": machine.command("benchmarks.serving_load"),
    }
    files.make_folder(flags.out.parent)
    files.write_text(flags.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    where = f"{result['hardware']}, jax {result['jax']}, Python {result['python']}"
    text = f"{to_markdown(result)}\n\n{where}. Command: `{result['command']}`"
    files.write_text(flags.out.with_suffix(".md"), text + "\n")
    print(text)


def _cache_tokens(model: api.DuoModel, flags: ServingLoadFlags) -> int:
    """Return how many tokens fit into the caches' bytes, beside all rings."""
    page, ring = bytes_of(model.runtime, page_size=_PAGE)
    left = flags.cache_mb * 1_000_000 - ring * (max(flags.clients) + _SNAPSHOTS)
    if left < page:
        raise InputError(f"{flags.cache_mb} MB of caches have no room for a page")
    return left // page * _PAGE


def _fit_at_once(model: api.DuoModel, flags: ServingLoadFlags) -> dict[str, int]:
    """Ask for more than these bytes of caches have room for; return how many run at once."""
    page, ring = bytes_of(model.runtime, page_size=_PAGE)
    length = min(flags.fit_tokens, model.config.architecture.max_positions)
    pages = -(-length // _PAGE)
    rows = flags.fit_mb * 1_000_000 // (pages * page + ring)
    if not rows:
        raise InputError(f"{flags.fit_mb} MB of caches have no room for {length:,} tokens")
    served = Engine(
        model,
        max_requests=rows,
        max_len=pages * _PAGE,
        cache_tokens=rows * pages * _PAGE,
        snapshots=0,
        prefix_reuse=False,
    )
    answer = min(_ANSWER, length // 2)
    prompt = tuple(range(3, 3 + length - answer))
    for _ in range(rows + 1):
        served.submit(Request(prompt=prompt, max_tokens=answer, ignore_eos=True), _ignore)
    patience = 2 + -(-length // served.sizes.prefill_chunk)  # a prompt is read before the next one
    most, steps = 0, 0
    while steps < patience:  # without another that could begin
        served.step()
        running = served.stats().running
        steps, most = (0, running) if running > most else (steps + 1, most)
    return {"tokens": length, "requests": most, "cache_tokens": rows * pages * _PAGE}


def _ignore(_: object) -> None:
    pass


def _measure(port: int, model: str, clients: int, flags: ServingLoadFlags) -> Load:
    run = {"model": model, "clients": clients, "max_tokens": flags.new_tokens}
    load.run(port, prompts=_texts(flags, clients, start=200_000 + clients), **run)
    return load.run(port, prompts=_texts(flags, flags.requests, start=clients), **run)


def _texts(flags: ServingLoadFlags, count: int, *, start: int) -> list[str]:
    """Return texts that begin alike, cut from the built-in text at some place."""
    text = "\n".join(load_documents(()))
    place = start * 7919 % (len(text) // 2)
    common = text[place : place + flags.common]
    step = (len(text) - place - flags.common - flags.own) // count
    ends = (place + flags.common + index * step for index in range(count))
    return [common + text[end : end + flags.own] for end in ends]


def to_markdown(result: dict[str, Any]) -> str:
    """Return the tables."""
    flags = result["flags"]
    rows = []
    for name, found in result["loads"].items():
        if isinstance(found, str):
            rows.append([name, found, *[""] * 6])
            continue
        for one in found:
            prompt = one["prompt_tokens"]
            cached = one["cached_tokens"]
            rows.append(
                [
                    name,
                    one["clients"],
                    f"{one['tokens_per_second']:.1f}",
                    *(f"{1000 * x:,.0f}" for x in one["first_token"]),
                    *(f"{1000 * x:,.0f}" for x in one["between_tokens"]),
                    "" if not prompt or cached is None else f"{cached / prompt:.0%}",
                ]
            )
    header = ["server", "clients", "new tokens/s", "first token, ms", "95%", "between, ms", "95%"]
    fit = " and ".join(
        f"{one['requests']} with {name} caches" for name, one in result["fit_at_once"].items()
    )
    length = result["fit_at_once"][FULL]["tokens"]
    return "\n".join(
        [
            markdown.table([*header, "prompt not read"], rows),
            "",
            f"Medians and 95th percentiles of {flags['requests']} streamed requests, "
            f"{flags['common']:,} characters in common and {flags['own']:,} of their own, "
            f"{flags['new_tokens']} new tokens, greedy. Our caches: {flags['cache_mb']} MB, "
            f"{result['dtype']}, {flags['sparsity']:.0%} streaming heads, sink {result['sink']}, "
            f"recent {result['recent']}. Load of the machine before: {result['load_before']}.",
            "",
            f"Requests of {length:,} tokens that run at once in {flags['fit_mb']:,} MB: {fit}.",
        ]
    )


if __name__ == "__main__":
    command.run(main, ServingLoadFlags)
