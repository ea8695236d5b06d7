"""/v1/chat/completions: chats that are answered."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from duo_jax.engine.request import TokenLogprob
from duo_jax.server import drawing, messages, written
from duo_jax.server.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    TopLogprob,
)
from duo_jax.server.errors import RESPONSES, STREAMED, ApiError
from duo_jax.server.replies import Replies
from duo_jax.server.schema import ChatBody
from duo_jax.server.service import Service
from duo_jax.server.streaming import GONE, EventStream, unless_gone
from duo_jax.server.vocabulary import Vocabulary

router = APIRouter(responses=RESPONSES)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def answer_chat(body: ChatBody, request: Request) -> Response:
    """Answer a chat."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    prompt = await service.tokenizing(messages.encode, body, service)
    asked = await service.tokenizing(
        drawing.requests,
        body,
        [prompt],
        service,
        max_tokens=_first(body.max_completion_tokens, body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        continues=bool(body.continue_final_message),
    )
    replies = await service.submit(asked)
    answer = _Answer(body, service, replies)
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

    def __init__(self, body: ChatBody, service: Service, replies: Replies) -> None:
        self._body, self._replies, self._vocabulary = body, replies, service.vocabulary
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = written.head(kind, "chatcmpl", service)

    async def whole(self) -> ChatCompletion:
        """Return the whole answer."""
        choices = []
        for index, one in enumerate(await written.collect(self._replies)):
            choices.append(
                ChatChoice.model_validate(
                    {
                        "index": index,
                        "message": AnswerMessage(content=one.text),
                        "logprobs": self._logprobs(one.logprobs),
                        "finish_reason": one.finish_reason,
                    }
                )
            )
        usage = written.usage(self._replies, self._body.n or 1)
        return ChatCompletion(**self._head, choices=choices, usage=usage)

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """Yield the answer piece by piece: who speaks, what, and why it ends."""
        counts = written.Counts(self._body, self._replies)
        for index in range(len(self._replies.requests)):
            yield self._chunk(index, counts, Delta(role="assistant", content=""))
        async for index, update in self._replies.updates():
            written.check(update)
            if update.text or update.logprobs:
                delta = Delta(content=update.text)
                yield self._chunk(index, counts, delta, logprobs=self._logprobs(update.logprobs))
            if update.finish_reason is not None:
                yield self._chunk(index, counts, Delta(), finish_reason=update.finish_reason)
        if (usage := counts.last()) is not None:
            yield ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(
        self,
        index: int,
        counts: written.Counts,
        delta: Delta,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: Any = None,
    ) -> ChatChunk:
        choice = ChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return ChatChunk(**self._head, choices=[choice], **counts.now())

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    **_spelled(one.token, one.logprob, self._vocabulary),
                    top_logprobs=[
                        TopLogprob(**_spelled(token, logprob, self._vocabulary))
                        for token, logprob in one.top
                    ],
                )
                for one in logprobs
            ]
        )


def _spelled(token: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "token": vocabulary.text(token),
        "logprob": logprob,
        "bytes": vocabulary.bytes(token),
    }


def _check(body: ChatBody) -> None:
    """Refuse what would change the answer, and cannot."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.tool_choice not in (None, "auto", "none"):
        raise ApiError(
            400,
            "tool_choice: tools are shown to the model, which calls them in its text or does not; "
            'only "auto" and "none" can be chosen',
            param="tool_choice",
        )
    if body.functions or body.function_call not in (None, "auto", "none"):
        raise ApiError(400, "functions are called tools now", param="functions")
    if body.audio is not None or (body.modalities or ["text"]) != ["text"]:
        raise ApiError(400, "modalities: only text can be written", param="modalities")


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
