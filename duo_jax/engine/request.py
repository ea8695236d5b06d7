"""What the engine is asked for, and what it answers with, piece by piece."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from msgspec import Meta

from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Seed, Size
from duo_jax.serve.sampling import SamplingConfig

MOST_LOGPROBS = 20  # other tokens whose log-probabilities a request may ask for, per token

Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@runtime_checkable
class TokenFilter(Protocol):
    """Which tokens a grammar allows next; used by one request alone."""

    def allowed(self) -> Int32[np.ndarray, " words"]:
        """Return a bit per token of the vocabulary, 32 in a word, the lowest first; 1: allowed."""
        ...

    def accept(self, token: int) -> None:
        """Go on by a token, which was allowed and does not end the text."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Raises:
      InputError: a field is of another kind or out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: Size
    """New tokens at most; 0: only the prompt is read, for its log-probabilities."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of all tokens that were written."""
    frequency_penalty: Penalty = 0.0
    """Subtracted for every time that a token was written."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: Seed = 0
    choice: Size = 0
    """Which of several texts with one seed; `DuoModel.generate` draws as its row of this number."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_tokens: tuple[int, ...] = ()
    """The text ends with one of these, beside the model's own."""
    ignore_eos: bool = False
    """The model's own end-of-text tokens do not end the text."""
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    """Log-probabilities of the tokens written, and of so many others at the place of each."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    """The same for the tokens of the prompt, which is then read without reuse of a prefix."""
    continues: bool = True
    """The text goes on where the prompt ends; otherwise, as in a chat, it is a text of its own."""
    skip_special_tokens: bool = True
    """Tokens such as <s> are not part of the text."""
    token_filter: TokenFilter | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, tuple) or any(
            type(token) is not int for token in self.prompt
        ):
            raise InputError(f"prompt {quoted(self.prompt)} is not a tuple of tokens")
        if not self.prompt:
            raise InputError("the prompt is empty: there is no token to start from")
        if not isinstance(self.stop, str) and "" in self.stop:
            raise InputError("a stop string is empty; nothing could be generated before it")
        check_fields(self, but=("token_filter", "prompt"))
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise InputError("logit_bias holds a number that is not finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability under the model itself: no temperature, penalty or grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens at this place, as many as were asked for, best first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """More of a request's answer. Updates of one request come in order; the last has a reason."""

    text: str = ""
    """What became certain; a token may add none, one may add that of several."""
    tokens: tuple[int, ...] = ()
    """New tokens, one that ended the text included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first update, where they were asked for; None for the first token."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not read, as their keys and values were held already."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What went wrong, in one line, where that is the reason."""


OnUpdate = Callable[[Update], None]


class QueueFullError(RuntimeError):
    """As many requests wait as may; ask again later."""


class DrainingError(RuntimeError):
    """The engine ends, and takes no more requests."""
