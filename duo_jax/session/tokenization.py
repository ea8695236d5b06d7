"""Tokenisation of prompts, continued prompts and chats, and the tokens that end an answer."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from duo_jax import files
from duo_jax.checkpoints import gguf, pretrained
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import read_json
from duo_jax.schema.kinds import Size
from duo_jax.session import chat_template

Message = dict[str, str]  # {"role": "user", "content": "..."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A model's tokenizer, and its end-of-text tokens."""

    tokenizer: Any  # of transformers
    stop_tokens: tuple[int, ...]

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Tokenise text.

        Args:
          text: any text but the empty one.
          continues: it continues a row, so no special tokens such as <s> are put in front of it.

        Raises:
          InputError: the text is empty.
        """
        if not isinstance(text, str):
            raise InputError(f"a text is needed, not {quoted(text)}")
        if not text:
            raise InputError("the prompt is empty")
        return self._encode(text, "the prompt", special=not continues)

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
        self, messages: Sequence[Message], *, answer: bool = True, before: Sequence[int] = ()
    ) -> list[int]:
        """Tokenise a chat with the model's template.

        Args:
          messages: roles and contents.
          answer: end with the opening of the assistant's turn.
          before: tokens of the chat so far. They are kept if the messages begin with their text: a
            model may spell an answer with other tokens than its tokenizer would.

        Raises:
          InputError: the model has no chat template, or it cannot render these messages.
        """
        text = self.render_chat(messages, answer=answer)
        said = self.tokenizer.decode(list(before), clean_up_tokenization_spaces=False)
        if not text.startswith(said):
            said, before = "", ()
        # The template writes the special tokens itself.
        return [*before, *self._encode(text[len(said) :], "the chat", special=False)]

    def _encode(self, text: str, name: str, *, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{name} holds half characters that no text can hold") from None
        # verbose: a text too long for the model is refused later, in one line.
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def load_tokenization(folder: pathlib.Path) -> Tokenization:
    """Load the tokenizer of the model in `folder`, and the tokens that end its answers.

    These are eos_token_id of generation_config.json and config.json (one or several each), and the
    tokenizer's own; or those that a GGUF file names.

    Raises:
      InputError: there is no usable tokenizer.
    """
    tokenizer = pretrained.load_tokenizer(folder)
    stops = {tokenizer.eos_token_id}
    if gguf.is_gguf(folder):
        stops.update(gguf.end_tokens(folder))
    for name in ("generation_config.json", "config.json"):
        stops.update(_eos_tokens(folder / name))
    stops.discard(None)
    return Tokenization(tokenizer=tokenizer, stop_tokens=tuple(sorted(stops)))


class _EndOfText(msgspec.Struct):
    eos_token_id: Size | list[Size] | None = None


def _eos_tokens(file: pathlib.Path) -> list[int]:
    if not files.is_file(file):
        return []
    found = convert(read_json(file), _EndOfText, files.shown(file)).eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]
