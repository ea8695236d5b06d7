"""Retrieval of the demo model: by length, by depth, and with all heads streaming."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from duo_jax.model import llama
from duo_jax.model.config import ModelConfig
from duo_jax.reports import markdown
from train.demo_model.presets import PRESET, TEMPLATES
from train.retrieval_test import RetrievalTest

_PASSKEY_WORDS = 8
_TOKENS_PER_PASSKEY = 64  # of text, at least
# As many as the preset asks for. More are tested at 1,024 tokens, where they fit easily.
_MAX_PASSKEYS = PRESET["data"]["num_passkeys"]
_MORE_PASSKEYS = {1024: (10, 12)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Exact retrieval at one length: fractions of passkeys whose every token is right.

    Attributes:
      length: tokens of each sample.
      per_sample: passkeys in each sample.
      passkeys: passkeys asked for, in all.
      full: every head retrieves.
      streaming: every head streams.
      by_depth: as `full`, by the tenth of the text in which the passkey was hidden; NaN where no
        passkey was.
    """

    length: int
    per_sample: int
    passkeys: int
    full: float
    streaming: float
    by_depth: Float[np.ndarray, " 10"]


def test(
    architecture: ModelConfig,
    params: llama.Params,
    tokenizer: Any,
    training_text: list[str],
    held_out_text: list[str],
    *,
    lengths: Sequence[int],
    num_samples: int,
    seed: int,
) -> list[Retrieval]:
    """Measure exact retrieval on held-out samples of every length."""
    results = []
    for length, number in _cases(lengths):
        data = dataclasses.replace(
            TEMPLATES,
            num_passkeys=number,
            passkey_words=_PASSKEY_WORDS,
            min_length=1,
            max_length=length,
        )
        samples = RetrievalTest(
            data, tokenizer, training_text, held_out_text, num_samples=num_samples, seed=seed
        )
        shape = (architecture.num_layers, architecture.num_kv_heads)
        full, streaming = (
            samples.accuracy(
                architecture, params, heads, sink_size=PRESET["sink"], recent_size=PRESET["recent"]
            )
            for heads in (np.ones(shape, bool), np.zeros(shape, bool))
        )
        tenth = np.array([[int(10 * d) for d in s.depths] for s in samples.samples])
        by_depth = [full[tenth == i].mean() if (tenth == i).any() else np.nan for i in range(10)]
        results.append(
            Retrieval(
                length=length,
                per_sample=number,
                passkeys=full.size,
                full=float(full.mean()),
                streaming=float(streaming.mean()),
                by_depth=np.array(by_depth),
            )
        )
    return results


def _cases(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of a length and a number of passkeys."""
    return [
        (length, number)
        for length in lengths
        for number in (
            max(1, min(_MAX_PASSKEYS, length // _TOKENS_PER_PASSKEY)),
            *_MORE_PASSKEYS.get(length, ()),
        )
    ]


def to_markdown(results: list[Retrieval]) -> str:
    """Write the table that the command prints and the model card shows."""
    columns = ["length", "passkeys per text", "tested", "full attention", "all streaming"]
    depths = [f"{10 * i}-{10 * i + 10}%" for i in range(10)]
    rows = [
        [f"{r.length:,}", r.per_sample, r.passkeys, f"{r.full:.1%}", f"{r.streaming:.1%}"]
        + ["-" if np.isnan(x) else f"{x:.1%}" for x in r.by_depth]
        for r in results
    ]
    return markdown.table(columns + depths, rows)
