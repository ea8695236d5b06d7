"""Answers that must be JSON: which tokens may come next, by llguidance."""

from typing import Any

import llguidance
import numpy as np
from jaxtyping import Int32
from llguidance import numpy as bits

from duo_jax.server.errors import ApiError
from duo_jax.server.schema import ResponseFormat
from duo_jax.server.vocabulary import Vocabulary

# One space and no line ends: small models would write nothing else without end.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonFilter:
    """Allows the tokens that go on with a JSON value (`duo_jax.engine.request.TokenFilter`)."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._allowed = bits.allocate_token_bitmask(1, vocab_size)

    def copy(self) -> "JsonFilter":
        """Return a filter for another answer, from the same place on."""
        return JsonFilter(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> Int32[np.ndarray, " words"]:
        """Return a bit per token."""
        bits.fill_next_token_bitmask(self._matcher, self._allowed)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self._matcher.get_error()}")
        return self._allowed[0]

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            why = self._matcher.get_error() or f"token {token} does not fit"
            raise RuntimeError(f"the grammar failed: {why}")


def json_filter(asked: ResponseFormat | None, vocabulary: Vocabulary) -> JsonFilter | None:
    """Return the filter for a `response_format`; None where any text will do.

    Raises:
      ApiError: there is no schema, or llguidance cannot use it.
      InputError: it cannot use the model's tokenizer.
    """
    if asked is None or asked.type == "text":
        return None
    schema: dict[str, Any] | None = {"type": "object"}
    if asked.type == "json_schema":
        schema = asked.json_schema.json_schema if asked.json_schema else None
        if schema is None:
            raise ApiError(
                400, "response_format has no json_schema.schema", param="response_format"
            )
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)
        matcher = llguidance.LLMatcher(vocabulary.matching, grammar, log_level=0)
        said = matcher.get_error() if matcher.is_error() else None
        found = JsonFilter(matcher, vocabulary.size)
        if said is None:
            # Some schemas are refused here only, others at the first token.
            bytes_ = found.allowed().view(np.uint8)
            for token in np.flatnonzero(np.unpackbits(bytes_, bitorder="little"))[:1]:
                found.copy().accept(int(token))
    except (ValueError, RecursionError, RuntimeError) as error:
        said = str(error)
    if said is not None:
        said = " ".join(said.partition("<state>")[0].split())  # of the library, for its authors
        message = f"the JSON schema cannot be followed: {said[:300]}"
        raise ApiError(422, message, param="response_format", code="unsupported_schema")
    return found
