"""How an answer that was written freely is scored against the true one."""

import re
import unicodedata

_WORD = re.compile(r"\w+")


def exact_match(written: str, answer: str) -> float:
    """Return 1 if the words of the answer occur in a row, else 0; case and punctuation are free."""
    written_words, answer_words = _words(written), _words(answer)
    size = len(answer_words)
    starts = range(len(written_words) - size + 1)
    return float(any(written_words[i : i + size] == answer_words for i in starts))


def word_recall(written: str, answer: str) -> float:
    """Return which fraction of the answer's different words was written, in whatever order."""
    wanted = set(_words(answer))
    return len(wanted & set(_words(written))) / len(wanted)


def has_words(answer: str) -> bool:
    """Return whether there is anything to be scored."""
    return bool(_words(answer))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
