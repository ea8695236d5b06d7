"""Calls of a tokenizer, with one line for what it cannot do.

The library `tokenizers` raises a bare `Exception` where a text has a character that a vocabulary
lacks, and Rust's panics, which are BaseExceptions, where a tokenizer.json is damaged or one of its
regular expressions gives up.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from duo_jax.errors import InputError

_DESCRIPTOR = threading.Lock()


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text.

    Args:
      tokenizer: of transformers.
      text: any text.
      special: put tokens such as <s> where the tokenizer puts them.

    Raises:
      InputError: the tokenizer fails at this text.
    """
    with calling(tokenizer, "encode this text"), without_panic_lines():
        # verbose: a text too long for the model is refused later, in one line.
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def decode(tokenizer: Any, tokens: Sequence[int], **options: Any) -> str:
    """Return the text of tokens.

    Args:
      tokenizer: of transformers.
      tokens: their numbers.
      options: those of its `decode`.

    Raises:
      InputError: the tokenizer fails at these tokens.
    """
    with calling(tokenizer, "decode its tokens"):
        return tokenizer.decode(tokens, **options)


class calling:  # noqa: N801, a context manager that costs less than contextlib's
    """Turn errors of `tokenizers` in a block into an InputError about a tokenizer.

    Args:
      tokenizer: of transformers, or its folder.
      task: what it is asked for, for the message.
    """

    def __init__(self, tokenizer: Any, task: str) -> None:
        self._tokenizer, self._task = tokenizer, task

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if kind is Exception or is_panic(error):
            where = getattr(self._tokenizer, "name_or_path", self._tokenizer)
            raise InputError(f"the tokenizer in {where} cannot {self._task}: {error}") from None


def is_panic(error: BaseException | None) -> bool:
    """Whether an exception is a panic of Rust, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def without_panic_lines() -> Iterator[None]:
    """Leave out what Rust writes to file descriptor 2 about a panic.

    What other threads write meanwhile comes afterwards.
    """
    # The descriptor is the whole process's: one thread at a time. Only Linux has memfd_create.
    if not hasattr(os, "memfd_create") or not _DESCRIPTOR.acquire(blocking=False):
        yield
        return
    try:
        with _held_back():
            yield
    finally:
        _DESCRIPTOR.release()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    try:
        real = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    held = os.memfd_create("stderr")
    os.dup2(held, 2)
    panicked = False
    try:
        yield
    except BaseException as error:
        panicked = is_panic(error)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        os.dup2(real, 2)
        if not panicked:
            os.lseek(held, 0, os.SEEK_SET)
            with contextlib.suppress(OSError):
                while content := os.read(held, 1 << 16):
                    os.write(2, content)
        os.close(real)
        os.close(held)
