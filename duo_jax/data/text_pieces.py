r"""Tokens of a text that continues another, without the space that some tokenizers put first.

A SentencePiece-style tokenizer encodes "Hello" as "▁Hello", as if a space stood in front of every
text. In the middle of a text nobody wrote that space. Published tokenizers add it in several ways:

    Metaspace, prepend_scheme "first"        at the beginning of a text
    Metaspace, "always"; Prepend("▁");       also behind every added token, such as <s>
    Replace(Regex(r"\A▁"), ...); ByteLevel(add_prefix_space=True)

`PieceEncoder` has a copy of the tokenizer without them.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from duo_jax.data import tokenizer_calls

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class PieceEncoder:
    """Encodes texts that continue others, and finds how far a text has been encoded.

    Args:
      tokenizer: of transformers. One that has no tokenizer of `tokenizers` inside encodes every
        text as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._inside, self._after_added = _without_prefix(tokenizer)

    def encode(self, text: str, *, before: Sequence[int] = ()) -> list[int]:
        """Return the tokens of a text, as those of the whole would go on where it begins.

        Args:
          text: the text.
          before: the tokens in front of it; only the last one matters.
        """
        if self._inside is None or (
            self._after_added and len(before) > 0 and int(before[-1]) in self._added
        ):
            return self._as_a_beginning(text)
        end = self._first_added(text)
        tokens: list[int] = []
        if end:
            with tokenizer_calls.calling(self._tokenizer, "encode this text"):
                tokens = self._inside.encode(text[:end], add_special_tokens=False).ids
        return tokens + (self._as_a_beginning(text[end:]) if end < len(text) else [])

    def spelled(self, tokens: Sequence[int], text: str, *, cut_off: bool = False) -> int | None:
        """Return how many characters of a text tokens spell, special tokens included.

        Args:
          tokens: of `encode`, or written by a model.
          text: begins as they do. Where a tokenizer puts a space, it may have one or none.
          cut_off: the bytes of the last character may be incomplete.

        Returns:
          The number of characters, None if the text begins otherwise.
        """
        parts: list[list[int]] = [[]]
        for token in tokens:
            if self._after_added and token in self._added:
                parts += [[token], []]
            else:
                parts[-1].append(token)
        place = 0
        for part in filter(None, parts):
            said = tokenizer_calls.decode(self._tokenizer, part, clean_up_tokenization_spaces=False)
            said = said.rstrip(_REPLACEMENT) if cut_off else said
            possible = [said, f" {said}", *([said[1:]] if said.startswith(" ") else [])]
            if self._inside is None or (place and part[0] in self._added):
                possible = [said]
            found = next((each for each in possible if text.startswith(each, place)), None)
            if found is None or not (said or cut_off):  # a space alone, which decoding dropped
                return None
            place += len(found)
        return place

    def _as_a_beginning(self, text: str) -> list[int]:
        return tokenizer_calls.encode(self._tokenizer, text, special=False)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        return {i: str(token) for i, token in self._tokenizer.added_tokens_decoder.items()}

    def _first_added(self, text: str) -> int:
        """Return where the first added token of a text begins, its length if it has none."""
        if any(added in text for added in self._added.values()):
            with tokenizer_calls.calling(self._tokenizer, "encode this text"):
                found = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            for token, (start, end) in zip(found.ids, found.offsets, strict=True):
                # <unk> also stands for what is not in the vocabulary.
                if text[start:end].strip() == self._added.get(token):
                    return start
        return len(text)


def _without_prefix(tokenizer: Any) -> tuple[Any, bool]:
    """Return a tokenizer that puts nothing in front of a text, None if the given one puts nothing.

    Returns:
      The tokenizer; and whether the given one also puts it behind every added token.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None or not hasattr(inner, "pre_tokenizer"):
        return None, False
    normalizer, pre_tokenizer = _state(inner.normalizer), _state(inner.pre_tokenizer)
    kept = _without_normalized_prefix(normalizer)
    parts = enumerate(_members(pre_tokenizer))
    schemes = [_switch_off(part, first=number == 0) for number, part in parts]
    if kept == normalizer and not any(schemes):
        return None, False
    from tokenizers import Tokenizer

    whole = json.loads(inner.to_str()) | {"normalizer": kept, "pre_tokenizer": pre_tokenizer}
    copy = Tokenizer.from_str(json.dumps(whole | {"truncation": None, "padding": None}))
    copy.encode_special_tokens = inner.encode_special_tokens
    return copy, kept != normalizer or "always" in schemes


def _state(part: Any) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer as tokenizer.json describes it."""
    return None if part is None else json.loads(part.__getstate__())


def _without_normalized_prefix(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Leave out what a normalizer does at the beginning of a text."""
    if state is None:
        return None
    if state["type"] == "Sequence":
        kept = [_without_normalized_prefix(part) for part in state["normalizers"]]
        return state | {"normalizers": [part for part in kept if part is not None]}
    pattern = (state.get("pattern") or {}).get("Regex", "")
    if state["type"] == "Prepend" or pattern.startswith("\\A"):
        return None
    if pattern.startswith("^"):  # the beginning of every line
        return state | {"pattern": {"Regex": f"(?<=\n){pattern[1:]}"}}
    return state | {"strip_left": False} if state["type"] == "Strip" else state


def _members(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the pre-tokenizers that a sequence consists of, or the one."""
    if state is None or state["type"] != "Sequence":
        return [] if state is None else [state]
    return [member for part in state["pretokenizers"] for member in _members(part)]


def _switch_off(state: dict[str, Any], *, first: bool) -> str | None:
    """Change a pre-tokenizer that puts a space in front of a text.

    Args:
      state: the pre-tokenizer.
      first: it gets the whole text. Otherwise it gets what an earlier one has divided, and puts a
        space in front of every part, those inside a text too; only "first" looks at the text.

    Returns:
      Where it put the space, None if nowhere.
    """
    scheme = state.get("prepend_scheme", "never")
    if scheme == "first" or (scheme == "always" and first):
        state["prepend_scheme"] = "never"
        return scheme
    if state["type"] == "ByteLevel" and state["add_prefix_space"] and first:
        state["add_prefix_space"] = False
        return "always"
    return None
