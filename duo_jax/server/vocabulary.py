"""The texts and bytes of single tokens, and what a grammar library needs to know of them."""

import functools
from collections.abc import Sequence
from typing import Any

import llguidance

from duo_jax.api import DuoModel
from duo_jax.data import tokenizer_calls
from duo_jax.errors import InputError
from duo_jax.server.errors import ApiError


class Vocabulary:
    """A model's tokens."""

    def __init__(self, model: DuoModel) -> None:
        self.size: int = model.config.architecture.vocab_size
        self._tokenizer = model.tokenizer
        self._ends = list(model.tokenization.stop_tokens)

    @functools.cached_property
    def matching(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance takes it.

        Raises:
          InputError: it cannot.
        """
        if not self._ends:
            raise InputError("the model names no token that ends a text, which a grammar needs")
        # Imports transformers, which says that there is no PyTorch unless our loaders came first.
        import llguidance.hf

        try:
            with tokenizer_calls.without_panic_lines():
                return llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self.size, eos_token=self._ends
                )
        except BaseException as error:  # panics of Rust are no Exceptions
            if not isinstance(error, Exception) and not tokenizer_calls.is_panic(error):
                raise
            raise InputError(f"no grammar can be used with this tokenizer: {error}") from None

    @functools.cache  # noqa: B019, as long as the model
    def text(self, token: int) -> str:
        """Return a token's own text, special ones included."""
        return tokenizer_calls.decode(
            self._tokenizer, [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def bytes(self, token: int) -> list[int]:
        """Return a token's bytes; a token may hold a part of a character."""
        try:
            return list(self.matching.decode_bytes([token]))
        except InputError:
            return list(self.text(token).encode())

    def check(self, tokens: Sequence[int], *, param: str) -> None:
        """Refuse tokens that the model does not have.

        Raises:
          ApiError: names the field of the body that holds one.
        """
        if tokens and max(tokens) >= self.size:
            message = f"token {max(tokens):,} is not one of the model's {self.size:,}"
            raise ApiError(400, message, param=param)

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer spells it, such as "Ġthe"; "" where it has none."""
        found: Any = self._tokenizer.convert_ids_to_tokens(token)
        return found or ""
