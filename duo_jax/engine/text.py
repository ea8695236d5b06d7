"""A request on its way: its tokens, where they are held, and the text that its answer makes."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int32

from duo_jax.engine.prefixes import Digests
from duo_jax.engine.request import FinishReason, OnUpdate, Request, TokenLogprob, Update
from duo_jax.session.detokenize import Detokenizer


@dataclasses.dataclass(kw_only=True, eq=False)
class Text:
    """A prompt and what was written so far."""

    ticket: int
    request: Request
    on_update: OnUpdate
    detokenizer: Detokenizer
    end_tokens: Collection[int]  # that end it, and have no text
    tokens: list[int]  # prompt and answer
    digests: Digests = dataclasses.field(default_factory=list)  # of the prompt's pages
    borders: list[int] = dataclasses.field(default_factory=list)  # of chunks
    held: int = 0  # tokens whose keys and values are in the cache
    row: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    cached_tokens: int | None = None  # None: not yet known
    prompt_logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)
    begun: bool = False  # an update was sent
    allowed: Int32[np.ndarray, " words"] | None = None  # by a grammar, next
    finish_reason: FinishReason | None = None

    @property
    def has_history(self) -> bool:
        """Whether its settings refer to tokens before the one that is drawn, or to a bias."""
        request = self.request
        penalties = (request.presence_penalty, request.frequency_penalty)
        repetition = request.sampling.repetition_penalty
        return any(penalties) or bool(request.logit_bias) or repetition not in (None, 1.0)

    @property
    def num_written(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def write(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token to the answer, and tell what that adds."""
        self.tokens.append(token)
        request = self.request
        ends = token in self.end_tokens
        text = self.detokenizer.push([] if ends else [token])
        if ends or self.detokenizer.stopped:
            self.finish_reason = "stop"
        elif self.num_written == request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.detokenizer.finish()
            if self.detokenizer.stopped:  # by what was held back
                self.finish_reason = "stop"
        elif request.token_filter is not None:
            request.token_filter.accept(token)
            self.allowed = request.token_filter.allowed()
        self._send(text, (token,), () if logprob is None else (logprob,))

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """End without another token."""
        self.finish_reason = reason
        self._send(self.detokenizer.finish(), (), (), error)

    def _send(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        error: str | None = None,
    ) -> None:
        scored = self.request.prompt_logprobs is not None and not self.begun
        self.begun = True
        self.on_update(
            Update(
                text=text,
                tokens=tokens,
                logprobs=logprobs,
                prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
                cached_tokens=self.cached_tokens or 0,
                finish_reason=self.finish_reason,
                error=error,
            )
        )


def new_text(
    ticket: int, request: Request, on_update: OnUpdate, tokenizer: Any, stop_tokens: Collection[int]
) -> Text:
    """Return a request's text before anything is written.

    Args:
      ticket: its number.
      request: the request.
      on_update: called with every update.
      tokenizer: the model's, of transformers.
      stop_tokens: the model's tokens that end a text.
    """
    own = () if request.ignore_eos else stop_tokens
    return Text(
        ticket=ticket,
        request=request,
        on_update=on_update,
        detokenizer=Detokenizer(
            tokenizer,
            context=request.prompt if request.continues else (),
            stop=request.stop,
            skip_special_tokens=request.skip_special_tokens,
        ),
        end_tokens=frozenset([*own, *request.stop_tokens]),
        tokens=list(request.prompt),
        allowed=None if request.token_filter is None else request.token_filter.allowed(),
    )
