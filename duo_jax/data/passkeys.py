"""Synthetic passkey retrieval, the calibration data of DuoAttention (section 2.2).

One sample is a long text with passkeys hidden at random depths, then one question per passkey with
its answer. Recalling an answer needs keys and values from far back, so a KV head's share in the
answers shows whether it is a retrieval head.

    [bos] intro, haystack with needles in it, closing | question answer separator, ...
                                                        ^ the tail: what is supervised

With a chat form every second sample is a chat: the user's message holds all before the tail, and
the assistant writes the tail. Models that were tuned for chats use other heads in them.

A sample is a pure function of (config, tokenizer, text, seed, index).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from duo_jax.data import tokenizer_calls
from duo_jax.data.passkey_templates import (
    ORDINALS,
    PasskeyTemplates,
    filled,
    tokens_per_word,
    word_list,
)
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError
from duo_jax.schema.kinds import Count, Many

_LENGTH_MULTIPLE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeyConfig(PasskeyTemplates):
    """The shape of calibration samples; the defaults are the paper's."""

    min_length: Count = 1000
    """Shortest haystack, in tokens."""
    max_length: Count = 32_000
    """Longest sample, in tokens, needles and questions included."""
    num_lengths: Many = 50
    """Number of haystack lengths, evenly spaced from --min-length to --max-length; a sample draws
    one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length > self.max_length:
            raise InputError(
                f"lengths {self.min_length} to {self.max_length}: min_length must be at most "
                "max_length"
            )


class TooShortError(InputError):
    """The text has fewer tokens than the longest sample needs."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One token sequence, and where its questions and answers are."""

    tokens: Int[np.ndarray, " length"]
    tail_start: int  # first token of the first question
    answers: tuple[tuple[int, int], ...]  # (start, stop) of each answer's tokens
    depths: tuple[float, ...]  # where each asked passkey was hidden, 0 = start of the haystack


class PasskeySampler:
    """Makes sample number `index` of a seed; holds the tokenized text.

    Args:
      config: templates and lengths of the samples.
      tokenizer: the model's, as transformers loads it.
      documents: the haystack.
      seed: decides every sample, together with the index.
      stream: another number gives another sequence of samples for the same seed.
      chat: what the model's chat template writes before and after a user's message; None: no chats.
      fewest: passkeys of a sample, which draws a number from here to config.num_passkeys; None:
        each has as many.

    Raises:
      TooShortError: the text is too short for max_length.
      InputError: max_length has no room for the passkeys, the tokenizer too few words for them, or
        fewest is not in 1 to config.num_passkeys.
    """

    def __init__(
        self,
        config: PasskeyConfig,
        tokenizer: Any,
        documents: Sequence[str],
        *,
        seed: int,
        stream: int = 0,
        chat: tuple[str, str] | None = None,
        fewest: int | None = None,
    ) -> None:
        self.config = config
        self._fewest = config.num_passkeys if fewest is None else fewest
        if not 1 <= self._fewest <= config.num_passkeys:
            raise InputError(
                f"min_passkeys {self._fewest} is not in 1 to num_passkeys, {config.num_passkeys}"
            )
        self._entropy = (seed, stream)
        self._encode = _encoder(tokenizer)
        self._bos = bos_tokens(tokenizer)
        # What stands before the haystack, and after it; for each form of samples.
        self._frames = [(self._begin(tokenizer, config.intro), self._encode(config.closing))]
        if chat is not None:
            before, after = chat
            opening = self._begin(tokenizer, before + config.intro)
            self._frames.append((opening, self._encode(config.closing + after)))
        self._words = word_list(config.words, tokenizer)
        if config.words != "nato":
            needed = config.num_passkeys * config.passkey_words
            if len(self._words) < needed:
                raise InputError(
                    f"{config.num_passkeys} passkeys of {config.passkey_words} distinct words need "
                    f"{needed} words; there are {len(self._words):,} of the kind {config.words}"
                )
        text = [t for d in documents for t in self._encode(d + "\n\n")]
        self._text = np.array(text, np.int32)

        self._longest_haystack(self._draw_passkeys(np.random.default_rng(0), config.num_passkeys))
        # Words differ in tokens; the shortest leave the most room, which the text must fill.
        fewest_tokens, self._most = tokens_per_word(config.words, self._words, self._encode)
        shortest = [[0] * fewest_tokens * config.passkey_words] * self._fewest
        needed = self._longest_haystack(shortest)
        if chat is not None:  # the other form of samples may be rounded up further
            needed += _LENGTH_MULTIPLE - 1
        if self._text.size < needed:
            raise TooShortError(
                f"the text has {self._text.size:,} tokens, samples of {config.max_length:,} need "
                f"at least {needed:,}; give more with --text, or lower --max-length"
            )

    def sample(self, index: int, *, length: int | None = None) -> Sample:
        """Make sample `index`.

        Args:
          index: any integer from 0.
          length: haystack tokens (cut so that the sample fits max_length); default: drawn from
            the configured lengths.
        """
        config = self.config
        rng = np.random.default_rng([*self._entropy, index])
        lengths = np.linspace(config.min_length, config.max_length, config.num_lengths)
        drawn = int(lengths[rng.integers(config.num_lengths)])
        count = self._count(index)
        depths = np.sort(rng.choice(np.linspace(0.05, 0.95, 1000), count, replace=False))
        passkeys = self._draw_passkeys(rng, count)
        frame = self._frames[index % len(self._frames)]

        overhead = len(self._assemble(passkeys, frame)[0])
        size = min(length or drawn, self._longest_haystack(passkeys))
        size += -(size + overhead) % _LENGTH_MULTIPLE
        start = rng.integers(self._text.size - size + 1)
        haystack = self._text[start : start + size]
        cuts = [int(size * depth) for depth in depths]
        order = rng.permutation(count).tolist()
        pieces = np.split(haystack, cuts)
        tokens, tail_start, answers = self._assemble(passkeys, frame, pieces, order)
        return Sample(
            tokens=np.array(tokens, np.int32),
            tail_start=tail_start,
            answers=tuple(answers),
            depths=tuple(float(depths[i]) for i in order),
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text that continues another."""
        return self._encode(text)

    def plain_text(self, index: int, *, tail: int | None = None) -> Sample:
        """Make a stretch of text as long as sample `index`, without passkeys.

        It is the whole text if that is shorter.

        Args:
          index: number of the sample.
          tail: last tokens that are supervised, as answers; None: all tokens are, as a text.
        """
        size = self.sample(index).tokens.size - len(self._bos)
        rng = np.random.default_rng([*self._entropy, index, 1])
        start = rng.integers(max(self._text.size - size, 0) + 1)
        tokens = [*self._bos, *self._text[start : start + size]]
        tail_start = 0 if tail is None else max(len(tokens) - tail, 1)
        answers = () if tail is None else ((tail_start, len(tokens)),)
        return Sample(
            tokens=np.array(tokens, np.int32), tail_start=tail_start, answers=answers, depths=()
        )

    @property
    def largest_token(self) -> int:
        """Largest token id in the text."""
        return int(self._text.max())

    def longest_tail(self) -> int:
        """Return an upper bound on the tokens from the first question to the end."""
        config = self.config
        question = max(len(self._encode(filled(config.question, n))) for n in ORDINALS)
        separator = len(self._encode(config.separator))
        # One token of slack per word: a tokenizer may cut a word in a row differently.
        return config.num_passkeys * (
            question + separator + config.passkey_words * (self._most + 1)
        )

    def _begin(self, tokenizer: Any, text: str) -> list[int]:
        """Encode the beginning of a text; chat templates may write the first token themselves."""
        tokens = tokenizer_calls.encode(tokenizer, text, special=False) if text else []
        return tokens if self._bos and tokens[:1] == self._bos else self._bos + tokens

    def _count(self, index: int) -> int:
        """Return a sample's number of passkeys, from a generator of its own."""
        rng = np.random.default_rng([*self._entropy, index, 2])
        return int(rng.integers(self._fewest, self.config.num_passkeys, endpoint=True))

    def _draw_passkeys(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        size = self.config.passkey_words
        distinct = self.config.words != "nato"
        chosen = rng.choice(len(self._words), (count, size), replace=not distinct)
        return [self._encode("".join(" " + self._words[w] for w in words)) for words in chosen]

    def _longest_haystack(self, passkeys: list[list[int]]) -> int:
        """Return how much text fits into max_length beside these passkeys."""
        config = self.config
        overhead = max(len(self._assemble(passkeys, frame)[0]) for frame in self._frames)
        longest = config.max_length // _LENGTH_MULTIPLE * _LENGTH_MULTIPLE
        if longest <= overhead:
            raise InputError(
                f"max_length {config.max_length} has no room for {config.num_passkeys} passkeys "
                f"of {config.passkey_words} words (they take {overhead} tokens); raise it, or ask "
                "for fewer or shorter passkeys"
            )
        return longest - overhead

    def _assemble(
        self,
        passkeys: list[list[int]],
        frame: tuple[list[int], list[int]],
        haystack: Sequence[Int[np.ndarray, " _"]] = (),
        order: Sequence[int] = (),
    ) -> tuple[list[int], int, list[tuple[int, int]]]:
        """Join the parts of a sample.

        Args:
          passkeys: tokens of each.
          frame: tokens before the haystack, and after it.
          haystack: what stands before each needle, and after the last; default: nothing.
          order: in which passkeys are asked for; default: as they stand in the text.

        Returns:
          All tokens, the first one of the tail, and (start, stop) of each answer.
        """
        config, encode = self.config, self._encode
        first, *others = config.needle.split("{passkey}")
        pieces = [piece.tolist() for piece in haystack] or [[]] * (len(passkeys) + 1)
        before, after = frame
        tokens = [*before]
        for piece, passkey, name in zip(pieces, passkeys, ORDINALS, strict=False):
            tokens += piece + encode(filled(first, name))
            for part in others:
                tokens += passkey + encode(filled(part, name))
        tokens += pieces[-1] + after
        tail_start, answers = len(tokens), []
        for i in order or range(len(passkeys)):
            tokens += encode(filled(config.question, ORDINALS[i]))
            answers.append((len(tokens), len(tokens) + len(passkeys[i])))
            tokens += passkeys[i] + encode(config.separator)
        return tokens, tail_start, answers


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    pieces = PieceEncoder(tokenizer)

    @functools.lru_cache(maxsize=4096)
    def encode(text: str) -> tuple[int, ...]:
        return tuple(pieces.encode(text))

    return lambda text: list(encode(text)) if text else []


def bos_tokens(tokenizer: Any) -> list[int]:
    """Return the begin-of-sequence token where the model expects one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    return [bos] if tokenizer_calls.encode(tokenizer, "a", special=True)[:1] == [bos] else []


def sampler_of_first(
    texts: Mapping[str, Sequence[str]],
    config: PasskeyConfig,
    tokenizer: Any,
    *,
    seed: int,
    stream: int,
) -> tuple[PasskeySampler, str]:
    """Return a sampler of the first text that is long enough, and the name of that text.

    Args:
      texts: documents by name, the preferred ones first.
      config: templates and lengths of the samples; decides how long a text must be.
      tokenizer: the model's.
      seed: decides every sample, together with the index.
      stream: another number gives other samples.

    Raises:
      TooShortError: even the last text is too short.
      InputError: as `PasskeySampler`.
    """
    *preferred, last = texts
    for name in preferred:
        with contextlib.suppress(TooShortError):
            return PasskeySampler(config, tokenizer, texts[name], seed=seed, stream=stream), name
    return PasskeySampler(config, tokenizer, texts[last], seed=seed, stream=stream), last
