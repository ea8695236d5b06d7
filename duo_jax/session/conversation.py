"""A conversation: one text that grows by reading and writing, and is never read twice."""

import pathlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypedDict

from duo_jax.cache import cache_bytes
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import argument, convert, path_argument
from duo_jax.schema.kinds import Count
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session import cache_files
from duo_jax.session.row_cache import Progress
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from duo_jax.session.text import write_text
from duo_jax.session.tokenization import Message, Tokenization


class _Message(TypedDict):
    role: str
    content: str


class Conversation:
    """A growing text. Plain text grows by `append` and `stream`, a chat by `tell` and `chat`.

    Args:
      runtime: the model.
      tokenization: its tokenizer.
      max_len: tokens the cache can hold; default: it grows with the text.
    """

    def __init__(
        self, runtime: Runtime, tokenization: Tokenization, *, max_len: int | None = None
    ) -> None:
        self.session = Session(runtime, max_len=max_len)
        self.messages: list[Message] = []
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
        tokens = self._tokenization.encode(text, continues=self.num_tokens > 0)
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
          text: text to read first.
          max_new_tokens: maximum number of tokens to write.
          stop: string or strings at which to stop; they are not yielded.
          seed: random seed.
          progress: called while `text` is read, with tokens read and tokens to read.
          **sampling: fields of `duo_jax.SamplingConfig`; default: greedy.

        Raises:
          InputError: as `append`; there is nothing to continue; or the conversation went on
            otherwise before this stream ended.
        """
        config = SamplingConfig(**sampling)
        max_new_tokens = argument("max_new_tokens", max_new_tokens, Count)
        if text is not None:
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
        config = SamplingConfig(**sampling)
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

        Args:
          text: the message.
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
        if not isinstance(text, str) or not text:
            raise InputError(f"the message is {quoted(text) if text else 'empty'}")
        messages = [*self.messages, {"role": role, "content": text}]
        tokens = self._tokenization.encode_chat(
            messages, answer=answer, before=self.session.tokens[0]
        )
        before, self.messages = self.messages, messages
        try:
            self.session.replace([tokens], room=room, progress=progress)
        except InputError:  # nothing was read; after an interrupt the message stays
            self.messages = before
            raise

    def cache_bytes(self) -> tuple[int, int]:
        """Return the live cache's bytes, and those it would take with retrieval heads only."""
        runtime, session = self.session.runtime, self.session
        if session.cache is None:
            return 0, 0
        return session.cache.nbytes, cache_bytes(
            runtime.config.all_retrieval(),
            batch_size=1,
            max_len=session.capacity,
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
        cache_files.save(self.session, folder, extra={"messages": self.messages})


def load_conversation(
    folder: str | pathlib.Path,
    runtime: Runtime,
    tokenization: Tokenization,
    *,
    max_len: int | None = None,
) -> Conversation:
    """Load a saved conversation; its text is not read again.

    Raises:
      InputError: the folder is no saved conversation, is damaged, or belongs to another model,
        pattern or version.
    """
    path_argument("folder", folder)
    conversation = Conversation(runtime, tokenization, max_len=max_len)
    extra = cache_files.load(conversation.session, folder)
    messages = convert(extra.get("messages", []), list[_Message], f"{folder}: messages")
    conversation.messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    return conversation
