"""Tasks: texts to compress, and the questions and answers that follow them.

needle: one passkey, and the question belongs to what is compressed. Methods that look at the end of
the prompt see the question, as in the evaluations of their papers.
passkeys: the text is compressed first; then all its passkeys are asked for, one after the other, on
the same cache. No method knows the questions in advance, as in a conversation that is served.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from duo_jax.data.documents import split_held_out
from duo_jax.data.passkey_templates import PasskeyTemplates, in_words
from duo_jax.data.passkeys import PasskeyConfig, Sample, sampler_of_first
from duo_jax.evaluate.results.forced import answer_means

TaskName = Literal["needle", "passkeys"]

_STREAM = 3  # of samples: identification takes 0 and 1, `evaluate passkeys` 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Texts with questions; a passkey counts when greedy decoding would write all of it."""

    name: TaskName
    in_words: str
    texts: list[Int[np.ndarray, " length"]]  # compressed
    tails: list[Int[np.ndarray, " tail"]]  # questions and answers after them
    answers: list[tuple[tuple[int, int], ...]]  # (start, stop) in the tail
    haystack: str

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(text.size for text in self.texts)

    @property
    def room(self) -> int:
        """Tokens of the longest tail."""
        return max(tail.size for tail in self.tails)

    def score(self, predicted: Sequence[Int[np.ndarray, " tail"]]) -> "Score":
        """Compare each tail with the most likely tokens, each after the true ones before it."""
        right = [
            [row[start:stop] == tail[start:stop] for start, stop in answers]
            for row, tail, answers in zip(predicted, self.tails, self.answers, strict=True)
        ]
        return Score(
            exact=np.array([np.mean([tokens.all() for tokens in row]) for row in right]),
            tokens=np.array([np.mean([tokens.mean() for tokens in row]) for row in right]),
        )

    def mean(self, values: Sequence[Float[np.ndarray, " tail"]]) -> Float[np.ndarray, " texts"]:
        """Return, for each text, the mean over its passkeys of the mean over a passkey's tokens."""
        return np.array(
            [np.mean(answer_means(*pair)) for pair in zip(values, self.answers, strict=True)]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """Means over the passkeys of each text."""

    exact: Float[np.ndarray, " texts"]  # fraction of passkeys whose every token is right
    tokens: Float[np.ndarray, " texts"]  # fraction of a passkey's tokens that are right


def make_task(
    name: TaskName,
    data: PasskeyTemplates,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int,
) -> Task:
    """Make a task of held-out text, or of all text where that is too short.

    Raises:
      InputError: the text is too short, or `length` has no room for the passkeys.
    """
    if name == "needle":
        data = dataclasses.replace(data, num_passkeys=1)
    config = PasskeyConfig(**dataclasses.asdict(data), min_length=1, max_length=length)
    texts = {
        "held-out text": split_held_out(documents)[1],
        "all text (the held-out part is shorter than the length)": documents,
    }
    sampler, haystack = sampler_of_first(texts, config, tokenizer, seed=seed, stream=_STREAM)
    drawn = [sampler.sample(index, length=length) for index in range(samples)]
    starts = [_compressed(name, sample) for sample in drawn]
    words = f"{data.num_passkeys} passkeys" if name == "passkeys" else "1 passkey"
    seen = "before the questions" if name == "passkeys" else "with the question"
    pairs = list(zip(drawn, starts, strict=True))
    return Task(
        name=name,
        in_words=f"{words} of {in_words(data.words, data.passkey_words)}; compressed {seen}",
        texts=[sample.tokens[:start] for sample, start in pairs],
        tails=[sample.tokens[start : sample.answers[-1][1]] for sample, start in pairs],
        answers=[
            tuple((first - start, stop - start) for first, stop in sample.answers)
            for sample, start in pairs
        ],
        haystack=haystack,
    )


def _compressed(name: TaskName, sample: Sample) -> int:
    """Return the number of tokens that are read, before the others are decoded one by one."""
    return sample.answers[0][0] if name == "needle" else sample.tail_start
