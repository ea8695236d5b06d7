"""/v1/completions: texts that are continued."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from duo_jax.data import tokenizer_calls
from duo_jax.server import drawing, written
from duo_jax.server.answers import Completion, TextChoice, TextLogprobs
from duo_jax.server.errors import RESPONSES, STREAMED, ApiError
from duo_jax.server.replies import Replies
from duo_jax.server.schema import CompletionBody
from duo_jax.server.service import Service
from duo_jax.server.streaming import GONE, EventStream, unless_gone
from duo_jax.server.text_logprobs import Speller, joined

router = APIRouter(responses=RESPONSES)
_MAX_TOKENS = 16  # where a body says nothing, as OpenAI's


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continue texts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    prompts = await service.tokenizing(_encode, body.prompt, service)
    logprobs = body.logprobs
    asked = await service.tokenizing(
        drawing.requests,
        body,
        [tokens for _, tokens in prompts],
        service,
        max_tokens=_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if body.echo else None,
    )
    replies = await service.submit(asked)
    texts = [text for text, _ in prompts for _ in range(body.n or 1)]
    answer = _Answer(body, service, replies, texts)
    if body.stream:
        return EventStream(answer.chunks(), replies.close)
    try:
        whole = await unless_gone(request.receive, answer.whole())
    finally:
        replies.close()
    if whole is None:
        return Response(status_code=GONE)
    return Response(whole.model_dump_json(), media_type="application/json")


class _Answer:
    """The answer to a body, whole or in chunks."""

    def __init__(
        self, body: CompletionBody, service: Service, replies: Replies, prompts: list[str]
    ) -> None:
        self._body, self._replies, self._prompts = body, replies, prompts
        self._service = service
        self._head = written.head("text_completion", "cmpl", service)
        echo = bool(body.echo)
        self._spellers = [Speller(service, one, echo=echo) for one in replies.requests]

    async def whole(self) -> Completion:
        """Return the whole answer."""
        found = await written.collect(self._replies)
        # Long prompts take a while to be spelled.
        choices = await self._service.tokenizing(
            lambda: [self._choice(index, one) for index, one in enumerate(found)]
        )
        usage = written.usage(self._replies, self._body.n or 1)
        return Completion(**self._head, choices=choices, usage=usage)

    async def chunks(self) -> AsyncIterator[Completion]:
        """Yield the answer piece by piece."""
        counts, begun = written.Counts(self._body, self._replies), set()
        async for index, update in self._replies.updates():
            written.check(update)
            parts, text, reason = [], update.text, update.finish_reason
            if self._body.echo and index not in begun:
                text = self._prompts[index] + text
                parts += await self._service.tokenizing(
                    self._prompt_logprobs, index, update.prompt_logprobs or ()
                )
            begun.add(index)
            if self._body.logprobs is not None and (update.logprobs or parts):
                last = reason is not None
                parts.append(
                    self._spellers[index].written(update.tokens, update.logprobs, last=last)
                )
            if text or parts or reason:
                choice = _choice(index, text, joined(parts) if parts else None, reason)
                yield Completion(**self._head, choices=[choice], **counts.now())
        if (usage := counts.last()) is not None:
            yield Completion(**self._head, choices=[], usage=usage)

    def _choice(self, index: int, one: written.Written) -> TextChoice:
        prompt, parts = "", []
        if self._body.echo:
            prompt = self._prompts[index]
            parts += self._prompt_logprobs(index, one.prompt_logprobs)
        if self._body.logprobs is not None:
            speller = self._spellers[index]
            parts.append(speller.written(one.tokens, one.logprobs, last=True))
        logprobs = joined(parts) if parts else None
        return _choice(index, prompt + one.text, logprobs, one.finish_reason)

    def _prompt_logprobs(self, index: int, logprobs: Any) -> list[TextLogprobs]:
        if self._body.logprobs is None:
            return []
        request = self._replies.requests[index]
        alone = request.max_tokens == 0
        return [self._spellers[index].prompt(request.prompt, logprobs, last=alone)]


def _choice(index: int, text: str, logprobs: TextLogprobs | None, reason: Any) -> TextChoice:
    return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def _check(body: CompletionBody) -> None:
    if body.suffix is not None:
        raise ApiError(400, "suffix: text can only be written after a prompt", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: all n texts are returned; leave it out", param="best_of")


def _encode(prompt: Any, service: Service) -> list[tuple[str, list[int]]]:
    """Return the text and the tokens of every prompt."""
    tokenization = service.engine.model.tokenization
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    found = []
    for one in prompt:
        if isinstance(one, str):
            found.append((one, tokenization.encode(one)))
            continue
        service.vocabulary.check(one, param="prompt")
        text = tokenizer_calls.decode(
            tokenization.tokenizer,
            one,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        found.append((text, one))
    return found
