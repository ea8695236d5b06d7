"""A conversation: one text that grows by reading and writing, and is never read twice."""

import pathlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from duo_jax.cache import cache_bytes
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import argument, convert, path_argument
from duo_jax.schema.kinds import Count
from duo_jax.serve.sampling import SamplingConfig, sampling_config
from duo_jax.session import cache_files
from duo_jax.session.row_cache import Progress
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from duo_jax.session.text import write_text
from duo_jax.session.tokenization import Message, Tokenization, check_variables


class _Message(TypedDict):
    role: str
    content: str


class Conversation:
    """A growing text. Plain text grows by `append` and `stream`, a chat by `tell` and `chat`.

    Args:
      runtime: the model.
      tokenization: its tokenizer.
      max_len: tokens the cache can hold; default: it grows with the text.
      chat_template_kwargs: variables for the model's chat template, as {"enable_thinking": False}.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenization: Tokenization,
        *,
        max_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.session = Session(runtime, max_len=max_len)
        self.messages: list[Message] = []
        self.chat_template_kwargs = check_variables(chat_template_kwargs)
        self._tokenization = tokenization

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far."""
        return len(self.session.tokens[0])

    def append(self, text: str, *, room: int = 0, progress: Progress | None = None) -> None:
        """Read more plain text.

        Args:
          text: the text.
          room: tokens for which the cache should have room beyond it.
          progress: called while it is read, with tokens read and tokens to read.

        Raises:
          InputError: the text is empty or too long, or this is a chat.
        """
        if self.messages:
            raise InputError("this conversation is a chat; plain text cannot be appended to it")
        before = self.session.tokens[0]
        tokens = self._tokenization.encode(text, continues=len(before) > 0, before=before)
        self.session.append([tokens], room=room, progress=progress)

    def stream(
        self,
        text: str | None = None,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Read more plain text, if any is given; then continue it, and yield text as it is written.

        Args:
          text: text to read first; the empty text continues what was read before, like None.
          max_new_tokens: maximum number of tokens to write.
          stop: string or strings at which to stop; they are not yielded.
          seed: random seed.
          progress: called while `text` is read, with tokens read and tokens to read.
          **sampling: fields of `duo_jax.SamplingConfig`; default: greedy.

        Raises:
          InputError: as `append`; there is nothing to continue; or the conversation went on
            otherwise before this stream ended.
        """
        config = sampling_config(sampling)
        max_new_tokens = argument("max_new_tokens", max_new_tokens, Count)
        if text is not None and (text != "" or self.num_tokens == 0):
            self.append(text, room=max_new_tokens, progress=progress)
        for (piece,) in self._write(max_new_tokens, stop, seed, config):
            yield piece

    def generate(self, text: str | None = None, **settings: Any) -> str:
        """Do what `stream` does, and return the whole text."""
        return "".join(self.stream(text, **settings))

    def chat(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Say something in a chat, and yield the answer as it is written.

        The model's own template formats the messages. Arguments are those of `stream`. An answer
        that the caller closes early stays in the chat as far as it was written.

        Raises:
          InputError: the model has no chat template, the chat has become too long, or the
            conversation began as plain text.
        """
        config = sampling_config(sampling)
        max_new_tokens = argument("max_new_tokens", max_new_tokens, Count)
        self.tell(text, answer=True, room=max_new_tokens, progress=progress)
        answer = ""
        try:
            for (piece,) in self._write(max_new_tokens, stop, seed, config):
                answer += piece
                yield piece
        finally:  # a partial answer stays in the transcript
            self.messages.append({"role": "assistant", "content": answer})

    def tell(
        self,
        text: str,
        *,
        role: str = "user",
        answer: bool = False,
        room: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Add a message to a chat and read it, without asking for an answer yet.

        Templates may write a system message into the first of the user, or refuse a chat without
        one; it is then read together with that one.

        Args:
          text: the message; only a system message may be empty, and is then in the place of the one
            that the template has.
          role: "user" or "system".
          answer: open the assistant's turn after it.
          room: tokens for which the cache should have room beyond these.
          progress: called while it is read, with tokens read and tokens to read.

        Raises:
          InputError: as `chat`.
        """
        if not self.messages and self.num_tokens:
            raise InputError("this conversation is plain text; begin a chat with a new one")
        argument("role", role, str)
        if not isinstance(text, str) or not (text or role == "system"):
            raise InputError(f"the message is {'empty' if isinstance(text, str) else quoted(text)}")
        messages = [*self.messages, {"role": role, "content": text}]
        try:
            tokens = self._encode(messages, answer)
        except InputError:
            if role != "system":
                raise
            tokens = []
        if role == "system" and not tokens:
            self._encode([*messages, {"role": "user", "content": "?"}], True)  # refused as well?
            self.messages = messages
            return
        before, self.messages = self.messages, messages
        try:
            self.session.replace([tokens], room=room, progress=progress)
        except InputError:  # nothing was read; after an interrupt the message stays
            self.messages = before
            raise

    def _encode(self, messages: Sequence[Message], answer: bool) -> list[int]:
        return self._tokenization.encode_chat(
            messages,
            answer=answer,
            before=self.session.tokens[0],
            variables=self.chat_template_kwargs,
        )

    def cache_bytes(self) -> tuple[int, int]:
        """Return the live cache's bytes, and those it would take with retrieval heads only."""
        runtime, session = self.session.runtime, self.session
        if session.cache is None:
            return 0, 0
        return session.cache.nbytes, cache_bytes(
            runtime.config.all_retrieval(),
            batch_size=1,
            max_len=session.whole_slots,
            dtype=runtime.dtype,
            kv=runtime.kv_format,
        )

    def _write(
        self, max_new_tokens: int, stop: str | Sequence[str], seed: int, sampling: SamplingConfig
    ) -> Iterator[list[str]]:
        return write_text(
            self.session,
            self._tokenization,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            sampling=sampling,
            segment=None,
            continues=not self.messages,
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Save text and cache; the folder appears only when complete.

        Raises:
          InputError: there is nothing to save, the folder exists, or it cannot be written.
        """
        path_argument("folder", folder)
        extra: dict[str, Any] = {"messages": self.messages}
        if self.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat_template_kwargs
        cache_files.save(self.session, folder, extra=extra)


def load_conversation(
    folder: str | pathlib.Path,
    runtime: Runtime,
    tokenization: Tokenization,
    *,
    max_len: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Conversation:
    """Load a saved conversation; its text is not read again.

    Arguments are those of `Conversation`; `chat_template_kwargs` are by default the saved ones.

    Raises:
      InputError: the folder is no saved conversation, is damaged, or belongs to another model,
        pattern or version.
    """
    path_argument("folder", folder)
    conversation = Conversation(
        runtime, tokenization, max_len=max_len, chat_template_kwargs=chat_template_kwargs
    )
    extra = cache_files.load(conversation.session, folder)
    messages = convert(extra.get("messages", []), list[_Message], f"{folder}: messages")
    conversation.messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    if chat_template_kwargs is None:
        saved = extra.get("chat_template_kwargs", {})
        conversation.chat_template_kwargs = check_variables(saved)
    return conversation
