"""Cost of smaller caches and weights on the demo model: passkeys found, logits moved, bytes kept.

    python -m benchmarks.quantised

Every setting answers the same questions on held-out text, through the caches that serve it (see
duo_jax.evaluate.passkeys.retrieval). Half of the heads stream, as the demo's pattern says; the
first row is the model with full caches. Differences are paired, text by text, against the split
model in its own dtype. The relative error of logits is |logits - that model's| / |that model's|,
before every token of all questions and answers.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

import duo_jax
from benchmarks import command
from duo_jax import files, serve
from duo_jax.api import DuoModel
from duo_jax.cache import KVFormat
from duo_jax.checkpoints import pretrained
from duo_jax.data.documents import load_documents, split_held_out
from duo_jax.data.passkeys import Sample
from duo_jax.errors import InputError
from duo_jax.evaluate.passkeys import retrieval as served_retrieval
from duo_jax.evaluate.results.forced import Forced
from duo_jax.heads.choose import DEFAULT_SPARSITY, NO_PATTERN
from duo_jax.model.quantised_weights import WeightFormat
from duo_jax.reports import machine, markdown, statistics
from duo_jax.session.runtime import Runtime
from train.demo_model.presets import TEMPLATES
from train.retrieval_test import RetrievalTest


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedFlags:
    """Flags of the benchmark."""

    kv: tuple[KVFormat, ...] = ("bf16", "int8", "int4", "int2")
    """Formats of caches to compare with the model's own; weights stay in its dtype."""
    weights: tuple[WeightFormat, ...] = ("int8", "w8a8", "int4")
    """Formats of weights to compare with the model's own; caches stay in its dtype."""
    both: tuple[tuple[WeightFormat, KVFormat], ...] = (("int8", "int4"),)
    """Pairs of formats of weights and caches."""
    samples: int = 128
    """Held-out texts."""
    length: int = 1024
    """Tokens of a text, passkeys and questions included."""
    passkeys: int = 8
    """Passkeys in each text."""
    passkey_words: int = 8
    """Words of a passkey; each is one token of the demo model."""
    chunk: int = 256
    """Tokens that are read at a time; mode exact."""
    rows: int = 16
    """Texts in a batch."""
    seed: int = 0
    """Random seed of texts and passkeys."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/quantised.json")
    """Where to write the result."""

    def __post_init__(self) -> None:
        if min(self.samples, self.rows) < 1:
            raise InputError("samples and rows must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """How the model is served; a row of the table."""

    heads: str
    weights: WeightFormat = "model"
    kv: KVFormat = "model"

    @property
    def full(self) -> bool:
        """Whether all heads have a full cache."""
        return self.heads == _FULL


_FULL, _DUO = "full", f"duo {1 - DEFAULT_SPARSITY:.0%}"


def all_formats(flags: QuantisedFlags) -> list[Formats]:
    """Return the rows: full caches, the split model to compare with, then what is smaller."""
    return [
        Formats(heads=_FULL),
        Formats(heads=_DUO),
        *(Formats(heads=_DUO, kv=kv) for kv in flags.kv),
        *(Formats(heads=_DUO, weights=weights) for weights in flags.weights),
        *(Formats(heads=_DUO, weights=weights, kv=kv) for weights, kv in flags.both),
    ]


def measure(flags: QuantisedFlags) -> dict[str, Any]:
    """Measure all formats."""
    began, environment = time.monotonic(), machine.environment()
    model = duo_jax.load(pretrained.DEMO)
    test = held_out(flags, model)
    rows, base = [], None
    for formats in tqdm(all_formats(flags), desc="formats", disable=None):
        model = _load(formats, flags.chunk)
        found = retrieve(model.runtime, test.samples, rows=flags.rows)
        if formats == Formats(heads=_DUO):
            base = found
        rows.append(dataclasses.asdict(formats) | numbers(found, None if formats.full else base))
    return {
        "command": machine.command("benchmarks.quantised"),
        "settings": machine.to_json(flags),
        **environment,
        "model": pretrained.DEMO,
        "dtype": str(model.runtime.dtype),
        "head_dim": model.config.architecture.head_dim,
        "retrieval_heads": model.config.retrieval_counts,
        "sink": model.config.sink_size,
        "recent": model.config.recent_size,
        "prefill_mode": model.runtime.prefill_mode,
        "haystack": test.haystack,
        "run_minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a model makes of some samples."""

    exact: Float[np.ndarray, "samples passkeys"]  # 1 where every token of a passkey is right
    tokens: Float[np.ndarray, "samples passkeys"]  # fraction of a passkey's tokens that are right
    logits: Float[np.ndarray, "tokens vocab"]  # before every token of all questions and answers
    cache_bytes: int  # of one row, measured


def retrieve(runtime: Runtime, samples: Sequence[Sample], *, rows: int) -> Found:
    """Ask for all passkeys of the samples, `rows` samples at a time."""
    exact, tokens, logits, cache_bytes = [], [], [], 0
    for first in range(0, len(samples), rows):
        part = samples[first : first + rows]
        forced, cache_bytes = served_retrieval.read(runtime, part)
        found = served_retrieval.judge(runtime, part, forced)
        exact.append(found.exact)
        tokens.append(found.tokens)
        logits.append(_logits(runtime, part, forced))
    return Found(
        exact=np.concatenate(exact),
        tokens=np.concatenate(tokens),
        logits=np.concatenate(logits),
        cache_bytes=cache_bytes,
    )


def _logits(
    runtime: Runtime, samples: Sequence[Sample], forced: Forced
) -> Float[np.ndarray, "tokens vocab"]:
    project = jax.jit(serve.logits, static_argnums=0)
    rest = project(runtime.config, runtime.params, jnp.asarray(forced.rest))
    every = np.concatenate([forced.first[:, None], np.asarray(rest)], axis=1)
    sizes = np.array([sample.tokens.size - sample.tail_start for sample in samples])
    return every[np.arange(every.shape[1]) < sizes[:, None]].astype(np.float32)


def numbers(found: Found, base: Found | None) -> dict[str, Any]:
    """Return the numbers of a row.

    Args:
      found: what it made of the samples.
      base: what the model to compare with made of them; None leaves the differences out.
    """
    values = {
        "exact": float(found.exact.mean()),
        "exact_error": _standard_error(found.exact),
        "tokens": float(found.tokens.mean()),
        "passkeys": found.exact.size,
        "cache_bytes": found.cache_bytes,
    }
    if base is not None:
        change = found.exact - base.exact
        error = compare_logits(found.logits, base.logits)
        values |= {
            "change": float(change.mean()),
            "change_error": _standard_error(change),
            "logits_relative_error": error.relative,
            "same_choice": error.same_choice,
        }
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsError:
    """Difference of logits from those of the model's own formats."""

    relative: float  # Euclidean norms, all tokens and the whole vocabulary
    same_choice: float  # fraction of tokens after which the most likely one is the same


def compare_logits(
    got: Float[np.ndarray, "tokens vocab"], want: Float[np.ndarray, "tokens vocab"]
) -> LogitsError:
    """Compare logits with those of the model's own weights and cache."""
    return LogitsError(
        relative=float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        same_choice=float((got.argmax(axis=-1) == want.argmax(axis=-1)).mean()),
    )


def to_markdown(result: dict[str, Any]) -> str:
    """Write the table; errors are two standard errors over texts."""
    columns = (
        "caches", "weights", "KV", "exact retrieval", "change, points", "tokens right",
        "relative error of logits", "cache kB",
    )  # fmt: skip
    return markdown.table(columns, map(_cells, result["rows"]))


def main(flags: QuantisedFlags) -> None:
    """Measure, write JSON and print the table."""
    result = measure(flags)
    files.make_folder(flags.out.parent)
    files.write_text(flags.out, json.dumps(result, indent=2) + "\n")
    print(to_markdown(result))


def held_out(flags: QuantisedFlags, model: DuoModel) -> RetrievalTest:
    """Return the texts, which training never saw."""
    data = dataclasses.replace(
        TEMPLATES,
        num_passkeys=flags.passkeys,
        passkey_words=flags.passkey_words,
        min_length=1,
        max_length=flags.length,
    )
    training_text, held_out_text = split_held_out(load_documents(()))
    return RetrievalTest(
        data,
        model.tokenizer,
        training_text,
        held_out_text,
        num_samples=flags.samples,
        seed=flags.seed,
    )


def _load(formats: Formats, chunk: int) -> DuoModel:
    return duo_jax.load(
        pretrained.DEMO,
        pattern=NO_PATTERN if formats.full else None,
        weights=formats.weights,
        kv=formats.kv,
        prefill_chunk=chunk,
    )


def _standard_error(passkeys: Float[np.ndarray, "samples passkeys"]) -> float:
    """Return the standard error of the mean; passkeys of one text hang together."""
    return statistics.standard_error(passkeys.mean(axis=1))


def _cells(row: dict[str, Any]) -> list[str]:
    compared = "change" in row
    return [
        row["heads"],
        row["weights"],
        row["kv"],
        f"{row['exact']:.1%} ± {200 * row['exact_error']:.1f}",
        f"{100 * row['change']:+.1f} ± {200 * row['change_error']:.1f}" if compared else "",
        f"{row['tokens']:.1%}",
        f"{row['logits_relative_error']:.2%}" if compared else "",
        f"{row['cache_bytes'] / 1e3:,.0f}",
    ]


if __name__ == "__main__":
    command.run(main, QuantisedFlags)
