"""Detokenisation of a stream of tokens: whole characters only, up to a stop string."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from duo_jax.data import tokenizer_calls
from duo_jax.errors import InputError

# Tokens of decoded text that stay in the window. What precedes them can no longer matter: a
# character has at most four bytes, a token at least one, and only the very first token of a
# window may lose its leading space.
_CONTEXT = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f])[0-9A-Fa-f]>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The growing text of one row.

    What `push` and `finish` return adds up to tokenizer.decode of all tokens, cut off before the
    first stop string. Nothing is returned that a later token could change:

    - Bytes that do not end a character wait for the rest of it.
    - A run of byte tokens (<0xE4> <0xBD> ..., as in Llama-2) waits for its end, because one bad
      byte turns every character of the run into U+FFFD. Only ASCII at its beginning does not wait,
      so that a newline (<0x0A>) can stop the text at once; it stays when the run turns out bad.
    - Text that may be the beginning of a stop string waits until that is decided.

    A stop string may be, or contain, a special token: such a token counts as its text when stop
    strings are looked for, though it is left out of what is returned. It ends a character that is
    incomplete in front of it.

    Only a window of the last tokens is ever decoded. The window's first token may be decoded
    differently from the middle of a text (without its leading space, or as half a character), but
    that shows equally before and after new tokens, so what is new is still right.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Start with an empty text.

        Args:
          tokenizer: a transformers tokenizer.
          context: tokens in front of the text, which is decoded as their continuation: it keeps
            the leading space that a tokenizer drops at the beginning of a text.
          stop: the text ends just before the first of these to be complete; of several that
            become complete with the same character, before the longest.
          skip_special_tokens: leave out tokens such as <s>, as in tokenizer.decode.

        Raises:
          InputError: a stop string is empty.
        """
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise InputError("a stop string is empty; nothing could be generated before it")
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._window = list(context[-_CONTEXT:])  # tokens that later ones are decoded with
        self._decoded = len(self._text_of(self._window))  # characters that were passed on
        self._byte_run: list[int] = []  # byte tokens whose run may go on
        # Special tokens that a stop string may be looked for in, although no text shows them.
        self._unseen = {
            i: text
            for i in self._special
            if (text := tokenizer.convert_ids_to_tokens(i))
            and any(_overlap(text, stop) for stop in self._stop)
        }
        self._held = ""  # certain text that may be the beginning of a stop string
        self._shown: list[bool] = []  # for each of its characters: no part of an unseen token
        self._parts: list[str] = []  # what was returned
        self._stopped = self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; tokens that come later are ignored."""
        return self._stopped

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._parts)

    def push(self, token_ids: Sequence[int]) -> str:
        """Append tokens; return the text that became certain, often none.

        How tokens are divided among calls does not change the text.
        """
        if self._finished:
            raise RuntimeError("tokens were pushed after finish")
        if self._stopped:
            return ""
        text = ""
        for tokens, unseen in self._divided(token_ids):
            closed = self._close_byte_run(tokens)
            if unseen:
                closed, self._byte_run = closed + self._byte_run, []
            if closed or unseen:
                text += self._until_stop(self._decode(closed, last=bool(unseen)))
            if unseen and not self._stopped:
                text += self._until_stop(unseen, shown=False)
            if self._stopped:
                break
        return self._return(text)

    def finish(self) -> str:
        """End the text; return what was held back, and U+FFFD for an incomplete character."""
        if self._finished or self._stopped:
            self._finished = True
            return ""
        self._finished = True
        rest = self._until_stop(self._decode(self._byte_run, last=True))
        if not self._stopped:
            rest += "".join(itertools.compress(self._held, self._shown))
            self._held, self._shown = "", []
        return self._return(rest)

    def _return(self, text: str) -> str:
        self._parts.append(text)
        return text

    def _divided(self, token_ids: Sequence[int]) -> Iterator[tuple[Sequence[int], str]]:
        """Divide tokens after every unseen one; yield those before it, and its text."""
        start = 0
        if self._unseen:
            for place, token_id in enumerate(token_ids):
                if int(token_id) in self._unseen:
                    yield token_ids[start:place], self._unseen[int(token_id)]
                    start = place + 1
        yield token_ids[start:], ""

    def _close_byte_run(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens in front of a run of byte tokens that may go on; keep that run."""
        tokens = self._byte_run
        end = 0
        for token_id in map(int, token_ids):
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
            # A model may have more logits than its tokenizer has tokens; those have no text.
            if not piece or token_id in self._special:
                continue
            tokens.append(token_id)
            byte = _BYTE_TOKEN.fullmatch(piece)
            ascii_first = byte and byte[1] < "8" and end == len(tokens) - 1
            if not byte or ascii_first:
                end = len(tokens)
        self._byte_run = tokens[end:]
        return tokens[:end]

    def _decode(self, token_ids: list[int], *, last: bool = False) -> str:
        """Move the window over new tokens; return the text they complete."""
        self._window += token_ids
        text = self._text_of(self._window)
        # A character that is cut off shows as one U+FFFD, the last; earlier ones are final.
        certain = text if last else text.removesuffix(_REPLACEMENT)
        new = certain[self._decoded :]
        self._window = self._window[-_CONTEXT:]
        self._decoded = len(self._text_of(self._window)) - (len(text) - len(certain))
        return new

    def _text_of(self, token_ids: list[int]) -> str:
        return tokenizer_calls.decode(
            self._tokenizer,
            token_ids,
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,  # it would change text that was returned
        )

    def _until_stop(self, new: str, *, shown: bool = True) -> str:
        """Return the text up to a stop string, or up to what may become one (which is held).

        Args:
          new: more text.
          shown: it is returned; otherwise it only counts for stop strings.
        """
        text = self._held + new
        marks = self._shown + [shown] * len(new)
        # The stop string that is complete first counts, however the text is divided.
        found = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            self._stopped, end = True, min(found)[1]
        else:
            longest = max(map(len, self._stop), default=1) - 1
            ends = range(max(0, len(text) - longest), len(text))
            possible = (at for at in ends if any(s.startswith(text[at:]) for s in self._stop))
            end = next(possible, len(text))
        self._held, self._shown = ("", []) if self._stopped else (text[end:], marks[end:])
        return "".join(itertools.compress(text[:end], marks))


def _overlap(text: str, stop: str) -> bool:
    """Whether an occurrence of a stop string may cover a part of a text."""
    return (
        text in stop
        or stop in text
        or any(stop.startswith(text[i:]) or stop.endswith(text[:i]) for i in range(1, len(text)))
    )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    found = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    return frozenset(found - {None})  # a special token that is the empty text has no number
