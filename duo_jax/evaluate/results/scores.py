"""Scores of a generated answer against the true one, by words."""

import re
import unicodedata

_WORD = re.compile(r"\w+")


def exact_match(written: str, answer: str) -> float:
    """Return 1 if the answer's words were written one after the other, else 0.

    Case and punctuation do not count.
    """
    written_words, answer_words = _words(written), _words(answer)
    size = len(answer_words)
    starts = range(len(written_words) - size + 1)
    return float(any(written_words[i : i + size] == answer_words for i in starts))


def word_recall(written: str, answer: str) -> float:
    """Return the fraction of the answer's distinct words that were written, in any order."""
    wanted = set(_words(answer))
    return len(wanted & set(_words(written))) / len(wanted)


def has_words(answer: str) -> bool:
    """Return whether the answer has a word to be scored."""
    return bool(_words(answer))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
