"""Training documents: text with passkeys, or repeated blocks, with a weight for every token.

A batch is a pure function of (stage, tokenizer, text, seed, index).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from duo_jax.data.passkeys import PasskeyConfig, PasskeySampler, Sample
from kernels import pytree
from train.demo_model.curriculum import Stage

_SHORTEST_BLOCK = 6
_CHECK_DOCUMENTS = 24
_CHECK_STREAM = 2  # other passkeys than training's


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """A batch. Token t + 1 is the target of position t; the weights are those of the targets.

    Answers, and repeated blocks from their second period on, have answer weight 1; ordinary text
    has filler weight 1. Tokens that cannot be predicted have neither: a passkey where it is hidden,
    the order of the questions, a first period.
    """

    tokens: Int[Array, "batch length"]
    answer: Float[Array, "batch length"]
    filler: Float[Array, "batch length"]


# Tokens, answer weights and filler weights of a document.
_Row = tuple[Int[np.ndarray, " length"], Float[np.ndarray, " length"], Float[np.ndarray, " length"]]


class DocumentSource:
    """Draws the documents of one stage.

    Args:
      stage: length and kind of its documents.
      tokenizer: as transformers loads it.
      text: documents in which passkeys are hidden.
      templates: how passkeys are hidden and asked for.
      seed: decides every document, together with an index.
    """

    def __init__(
        self, stage: Stage, tokenizer: Any, text: list[str], templates: PasskeyConfig, *, seed: int
    ) -> None:
        self._stage = stage
        self._seed = seed
        self._vocab_size = len(tokenizer)
        self._special = len(tokenizer.all_special_ids)
        self._samplers = {}
        for stream in (0, _CHECK_STREAM):
            self._samplers[stream] = [
                PasskeySampler(
                    dataclasses.replace(
                        templates,
                        num_passkeys=number,
                        passkey_words=words,
                        min_length=1,
                        max_length=stage.length,
                    ),
                    tokenizer,
                    text,
                    seed=seed,
                    stream=stream,
                )
                for number in stage.num_passkeys
                for words in stage.passkey_words
            ]

    def training_batch(self, index: int) -> Documents:
        """Make the batch of training step `index`."""
        rows = []
        for row in range(self._stage.batch_size):
            rng = np.random.default_rng([self._seed, index, row])
            if rng.random() < self._stage.repeat:
                rows.append(self._repeated(rng))
            else:
                sampler = self._samplers[0][rng.integers(len(self._samplers[0]))]
                number = index * self._stage.batch_size + row
                rows.append(self._weighted(sampler.sample(number, length=self._stage.length)))
        return _stack(rows)

    def check_batches(self) -> list[Documents]:
        """Make the fixed documents that decide when the stage is over: passkeys only."""
        samplers, size = self._samplers[_CHECK_STREAM], self._stage.batch_size
        rows = [
            self._weighted(samplers[i % len(samplers)].sample(i, length=self._stage.length))
            for i in range(math.ceil(_CHECK_DOCUMENTS / size) * size)
        ]
        return [_stack(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _weighted(self, sample: Sample) -> _Row:
        """Return the tokens of a sample with passkeys, and their weights."""
        answer = np.zeros(sample.tokens.size, np.float32)
        filler = np.zeros(sample.tokens.size, np.float32)
        filler[1 : sample.tail_start] = 1.0
        for start, stop in sample.answers:
            answer[start:stop] = 1.0
            hidden = _find(sample.tokens[: sample.tail_start], sample.tokens[start:stop])
            filler[hidden : hidden + stop - start] = 0.0
        return sample.tokens, answer, filler

    def _repeated(self, rng: np.random.Generator) -> _Row:
        """Return a random block that is repeated, and the weights of its tokens."""
        length = self._stage.length
        size = rng.integers(_SHORTEST_BLOCK, length // 2 + 1)
        block = rng.integers(self._special, self._vocab_size, size)
        tokens = np.resize(block, length).astype(np.int32)
        answer = (np.arange(length) >= size).astype(np.float32)
        return tokens, answer, np.zeros(length, np.float32)


def _find(tokens: Int[np.ndarray, " length"], passkey: Int[np.ndarray, " size"]) -> int:
    """Return where the passkey begins in the tokens."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, passkey.size)
    return int(np.flatnonzero((windows == passkey).all(axis=1))[0])


def _stack(rows: list[_Row]) -> Documents:
    tokens, answer, filler = (jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))
    return Documents(tokens=tokens, answer=answer, filler=filler)
