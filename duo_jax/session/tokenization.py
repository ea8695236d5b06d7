"""Tokenisation of prompts, continued prompts and chats, and the tokens that end an answer."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from duo_jax import files
from duo_jax.checkpoints import gguf, pretrained
from duo_jax.data import tokenizer_calls
from duo_jax.data.text_pieces import PieceEncoder
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import MAX_BYTES, parse_json, read_json
from duo_jax.schema.kinds import LARGEST_INT32, Size
from duo_jax.session import chat_template

Message = dict[str, Any]  # {"role": "user", "content": "..."}, and what a template knows more
_LONG_TEXT = 1 << 19  # characters; shorter ones are encoded before they are counted
_NORMALISED = 4  # characters that a normaliser may make one of
_LONGEST_VARIABLES = MAX_BYTES // 2  # characters, as ASCII; messages are kept beside them
_OF_THE_CHAT = frozenset(["messages", "add_generation_prompt"])  # no variables for users to set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A model's tokenizer, and its end-of-text tokens."""

    tokenizer: Any  # of transformers
    stop_tokens: tuple[int, ...]
    max_tokens: int = LARGEST_INT32  # the model's range

    def encode(
        self, text: str, *, continues: bool = False, before: Sequence[int] = ()
    ) -> list[int]:
        """Tokenise text.

        Args:
          text: any text but the empty one.
          continues: it continues a row, so neither special tokens such as <s> nor a space are put
            in front of it.
          before: the tokens of that row.

        Raises:
          InputError: the text is empty, or too long for the model whatever its tokens are.
        """
        if not isinstance(text, str):
            raise InputError(f"a text is needed, not {quoted(text)}")
        if not text:
            raise InputError("the prompt is empty")
        self._check(text, "the prompt")
        if continues:
            return self._pieces.encode(text, before=before)
        return self._encode(text, special=True)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continues: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write out a chat as transformers' apply_chat_template does, special tokens included.

        Args:
          messages: roles and contents.
          answer: end with the opening of the assistant's turn.
          continues: end within the last message instead, for the model to continue it.
          variables: more of what the template sees, of the types that JSON has.

        Raises:
          InputError: the model has no chat template, or it cannot render these messages within the
            bounds of `chat_template`.
        """
        if not self.tokenizer.chat_template:
            raise InputError("this model has no chat template; leave out --chat")
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError:  # the only one that it raises
            raise InputError("the model has several chat templates, none named default") from None
        if not isinstance(template, str):
            raise InputError("the model's chat template is no text")
        seen = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": answer,
            **self.tokenizer.special_tokens_map,
            **(variables or {}),
        }
        if continues:
            return chat_template.render_open(template, messages, seen)
        return chat_template.render(template, messages, seen)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        before: Sequence[int] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokenise a chat with the model's template.

        Args:
          messages: roles and contents.
          answer: end with the opening of the assistant's turn.
          before: tokens of the chat so far. They are kept as far as the messages begin with their
            text: a model may spell an answer with other tokens than its tokenizer would.
          variables: as in `render_chat`.

        Raises:
          InputError: the model has no chat template, or it cannot render these messages.
        """
        text = self.render_chat(messages, answer=answer, variables=variables)
        whole = self.encode_markup(text)  # the template writes the special tokens itself
        kept, place = self._shared(text, before)
        if whole[: len(kept)] == kept:
            return whole
        return kept + self._pieces.encode(text[place:], before=kept)

    def encode_plain(self, text: str, *, special: bool) -> list[int]:
        """Tokenise any text, the empty one too, with or without special tokens in front of it.

        Raises:
          InputError: it is no text, or too long for the model whatever its tokens are.
        """
        self._check(text, "the prompt")
        return self._encode(text, special=special)

    def encode_markup(self, text: str) -> list[int]:
        """Tokenise the beginning of a rendered chat, which holds its own special tokens.

        Raises:
          InputError: it is no text, or too long for the model whatever its tokens are.
        """
        self._check(text, "the chat")
        return self._encode(text, special=False)

    def _check(self, text: str, name: str) -> None:
        """Refuse what is no text, or longer than any tokens that the model has a range for.

        A token takes 300 bytes while a text is encoded. Normalisers may make one character of a
        few; a text of spaces alone, which some tokens swallow, is the only one refused wrongly.
        """
        _check_characters(text, name)
        if len(text) > _LONG_TEXT and len(text) > self._most_characters:
            raise InputError(
                f"{len(text):,} characters are too many: the model's range is "
                f"{self.max_tokens:,} tokens"
            )

    @functools.cached_property
    def _most_characters(self) -> int:
        return self.max_tokens * _NORMALISED * max(map(len, self.tokenizer.get_vocab()))

    @functools.cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self.tokenizer)

    def _shared(self, text: str, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the tokens that spell the beginning of a text, and how many characters that is."""
        spelled, low, high = self._pieces.spelled, 0, len(tokens)
        while low < high:  # the most tokens that spell it, but for a character that is cut off
            middle = (low + high + 1) // 2
            begins = spelled(tokens[:middle], text, cut_off=True) is not None
            low, high = (middle, high) if begins else (low, middle - 1)
        while (place := spelled(tokens[:low], text)) is None:
            low -= 1
        return list(tokens[:low]), place

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return tokenizer_calls.encode(self.tokenizer, text, special=special)


def check_variables(variables: Any) -> dict[str, Any]:
    """Return variables for a chat template, which are JSON; None: no variables.

    Raises:
      InputError: they are none, are more than a saved conversation could bring back, or one has a
        name that the chat itself gives.
    """
    if variables is None:
        return {}
    try:
        if not isinstance(variables, Mapping):
            raise TypeError
        text = json.dumps(dict(variables), allow_nan=False)
        same = json.loads(text) == dict(variables)
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise InputError(
            f"chat_template_kwargs {quoted(variables)} is not a dict of texts to JSON values"
        )
    if len(text) > _LONGEST_VARIABLES:
        raise InputError(
            f"chat_template_kwargs has {len(text):,} characters, above {_LONGEST_VARIABLES:,}"
        )
    [[copied]] = parse_json(f"[[{text}]]", "chat_template_kwargs")  # as deep as in a cache.json
    taken = _OF_THE_CHAT.intersection(copied)
    if taken:
        raise InputError(f"chat_template_kwargs cannot hold {', '.join(sorted(taken))}")
    return copied


def _check_characters(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half characters that no text can hold") from None


def load_tokenization(folder: pathlib.Path) -> Tokenization:
    """Load the tokenizer of the model in `folder`, and the tokens that end its answers.

    These are eos_token_id of generation_config.json and config.json (one or several each), and the
    tokenizer's own; or those that a GGUF file names.

    Raises:
      InputError: there is no usable tokenizer.
    """
    if gguf.is_gguf(folder):
        from duo_jax.checkpoints.gguf import tokenizer as gguf_tokenizer  # as in pretrained

        header = gguf.read_header(folder)
        tokenizer, ends = gguf_tokenizer.load_tokenizer(header), gguf_tokenizer.end_tokens(header)
    else:
        tokenizer, ends = pretrained.load_tokenizer(folder), []
    stops = {tokenizer.eos_token_id, *ends}
    for name in ("generation_config.json", "config.json"):
        stops.update(_eos_tokens(folder / name))
    stops.discard(None)
    return Tokenization(tokenizer=tokenizer, stop_tokens=tuple(sorted(stops)))


class _EndOfText(msgspec.Struct):
    eos_token_id: Size | list[Size] | None = None


def _eos_tokens(file: pathlib.Path) -> list[int]:
    if not files.present(file):
        return []
    found = convert(read_json(file), _EndOfText, files.shown(file)).eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]
