"""Documents with one fact hidden at a depth, and a question about it at the end.

    [bos] intro | haystack up to the depth | needle | the rest of it | closing question

The needle stands after the sentence whose end is nearest to the depth, or inside a sentence where
none ends within 5% of the haystack. A text shorter than the haystack is repeated. A document is
a pure function of (templates, tokenizer, text, seed, length, depth, sample).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from duo_jax.data import tokenizer_calls
from duo_jax.data.passkey_templates import (
    DIGITS,
    Words,
    check_words,
    take_defaults,
    word_list,
)
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError
from duo_jax.evaluate.results import scores
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Many, Template
from duo_jax.session.tokenization import Tokenization

_WORDS = "{words}"
_ANSWER = "{answer}"
_NEAR = 0.05  # most distance of a needle from its depth, as a fraction of the haystack
# As passkeys of digits.
_DIGITS = {
    "intro": DIGITS["intro"],
    "needle": "\n\nThe pass key is {answer}. Remember it.\n\n",
    "answer": _WORDS,
    "question": "\n\nWhat is the pass key? The pass key is",
    "answer_words": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTemplates:
    """The fact that is hidden, and the question about it."""

    intro: Template = "Here is a long text. A question about it follows.\n\n"
    """Text before the haystack."""
    needle: Template = "\n\nThe best thing to do in Lisbon on a rainy afternoon is {answer}.\n\n"
    """The sentence that is hidden; {answer} stands for the fact."""
    answer: Template = "to ride tram number 28 with a bag of roasted chestnuts and an old map"
    """The fact to be found; {words} stands for random words, new ones in each document."""
    question: Template = (
        "\n\nQuestion: What does the text say is the best thing to do in Lisbon on a rainy "
        "afternoon?\nAnswer: The best thing to do in Lisbon on a rainy afternoon is"
    )
    """Text after the haystack, which the model continues."""
    answer_words: Many = 6
    """Number of random words that {words} stands for."""
    words: Words = "nato"
    """Kind of random words: the NATO alphabet, lower-case words that are one token each, or numbers
    of five digits. With digits, the answer is one number, and the texts that are left at their
    defaults change: the needle becomes "The pass key is {answer}. Remember it."."""

    def __post_init__(self) -> None:
        if self.words == "digits":
            take_defaults(self, _DIGITS)
        check_fields(self)
        if self.needle.count(_ANSWER) != 1:
            raise InputError("the needle must hold {answer} once")
        check_words(self.answer.count(_WORDS) * self.answer_words, "all {words} of the answer")
        if not scores.has_words(self.answer.replace(_WORDS, "x")):
            raise InputError("the answer has no word that could be found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text with its needle."""

    tokens: list[int]
    answer: str
    answer_tokens: list[int]  # as they would follow the tokens
    depth: float  # where the needle stands, as a fraction of the haystack


class Haystack:
    """Makes documents of any length.

    Args:
      templates: needle and question.
      tokenization: the model's.
      documents: the text that needles are hidden in.
      seed: decides where a haystack begins, and the random words.
      chat: put everything into one message of the model's chat template.
    """

    def __init__(
        self,
        templates: NeedleTemplates,
        tokenization: Tokenization,
        documents: Sequence[str],
        *,
        seed: int,
        chat: bool = False,
    ) -> None:
        self._templates, self._tokenization, self._seed = templates, tokenization, seed
        self._chat = chat
        # Documents may be longer than the model's range, unlike what Tokenization encodes.
        encode = PieceEncoder(tokenization.tokenizer).encode
        self._text = np.array([t for d in documents for t in encode(d + "\n\n")], np.int32)
        if not self._text.size:
            raise InputError("the text is empty")
        self._ends = _sentence_ends(self._text, tokenization.tokenizer)
        self._words = word_list(templates.words, tokenization.tokenizer)
        # Whether an answer follows without a space: in a message of its own, or after one.
        self._begins_anew = chat or templates.question[-1:].isspace()

    @property
    def text_tokens(self) -> int:
        """Tokens of the text; longer haystacks repeat it."""
        return self._text.size

    def shortest(self) -> int:
        """Return the tokens of a document without any haystack."""
        return max(
            sum(map(len, self._parts(self._answer(np.random.default_rng(i))))) for i in range(8)
        )

    def document(self, *, length: int, depth: float, sample: int = 0) -> Document:
        """Make a document.

        Args:
          length: tokens of the prompt: haystack, needle, question and all.
          depth: where the needle is hidden, 0 at the beginning to 1 at the end.
          sample: another number gives another haystack and other words.

        Raises:
          InputError: the length has no room for the needle and its question.
        """
        at = [self._seed, sample, length, round(1e6 * depth)]
        rng = np.random.default_rng(at)
        answer = self._answer(rng)
        before, needle, after = self._parts(answer)
        size = length - len(before) - len(needle) - len(after)
        if size < 1:
            raise InputError(
                f"{length:,} tokens have no room for the needle and its question, which take "
                f"{length - size:,}"
            )
        start = rng.integers(self._text.size)
        places = (start + np.arange(size)) % self._text.size
        haystack, ends = self._text[places], self._ends[places]
        cut = self._cut(ends, depth)
        tokens = [*before, *haystack[:cut].tolist(), *needle, *haystack[cut:].tolist(), *after]
        return Document(
            tokens=tokens,
            answer=answer,
            answer_tokens=self._encode(answer if self._begins_anew else " " + answer),
            depth=cut / size,
        )

    def _cut(self, ends: Bool[np.ndarray, " tokens"], depth: float) -> int:
        """Return how many tokens of the haystack stand before the needle."""
        wanted = round(depth * ends.size)
        sentences = np.flatnonzero(ends) + 1
        if wanted in (0, ends.size) or not sentences.size:
            return wanted
        nearest = sentences[np.argmin(np.abs(sentences - wanted))]
        return int(nearest) if abs(nearest - wanted) <= _NEAR * ends.size else wanted

    def _answer(self, rng: np.random.Generator) -> str:
        templates = self._templates
        count = templates.answer_words
        distinct = len(self._words) >= count
        words = rng.choice(len(self._words), count, replace=not distinct)
        return templates.answer.replace(_WORDS, " ".join(self._words[i] for i in words))

    def _parts(self, answer: str) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens before the haystack, the needle, and those after the haystack."""
        templates, encode = self._templates, self._encode
        needle = encode(templates.needle.replace(_ANSWER, answer))
        if not self._chat:
            before = self._tokenization.encode(templates.intro)
            return before, needle, encode(templates.question)
        mark = "\N{WHITE SQUARE CONTAINING BLACK SMALL SQUARE}"
        content = f"{templates.intro}{mark}{templates.question}"
        chat = self._tokenization.render_chat([{"role": "user", "content": content}])
        head, found, tail = chat.partition(mark)
        if not found or mark in tail:
            raise InputError("the model's chat template does not show a message exactly once")
        return self._tokenization.encode_markup(head), needle, encode(tail)

    def _encode(self, text: str) -> list[int]:
        return self._tokenization.encode(text, continues=True) if text else []


def _sentence_ends(text: Int[np.ndarray, " tokens"], tokenizer: Any) -> Bool[np.ndarray, " tokens"]:
    """Return, for every token, whether a sentence ends with it."""
    ids, where = np.unique(text, return_inverse=True)
    pieces = [tokenizer_calls.decode(tokenizer, [int(i)]) for i in ids]
    ends = np.array([piece.rstrip(" ").endswith((".", "\n", "!", "?")) for piece in pieces])
    return ends[where]
