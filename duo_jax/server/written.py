"""What requests have written: collected to whole answers, and counted."""

import dataclasses
import time
import uuid
from typing import Any

from duo_jax.engine.request import TokenLogprob, Update
from duo_jax.server.answers import PromptTokensDetails, Usage
from duo_jax.server.errors import ApiError
from duo_jax.server.replies import Replies
from duo_jax.server.schema import Generation
from duo_jax.server.service import Service


@dataclasses.dataclass(kw_only=True)
class Written:
    """All that answers one request."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: str = ""


async def collect(replies: Replies) -> list[Written]:
    """Return the whole answers, in the order of the requests.

    Raises:
      ApiError: one could not be ended.
    """
    found = [Written() for _ in replies.requests]
    async for index, update in replies.updates():
        check(update)
        one = found[index]
        one.text += update.text
        one.tokens += update.tokens
        one.logprobs += update.logprobs
        one.prompt_logprobs = update.prompt_logprobs or one.prompt_logprobs
        one.finish_reason = update.finish_reason or ""
    return found


def check(update: Update) -> None:
    """Refuse an answer that is none.

    Raises:
      ApiError: the request ended early, but not as it asked for.
    """
    if update.finish_reason == "cancelled":
        raise ApiError(503, "the server ended before this was answered", code="cancelled")
    if update.finish_reason == "error":
        raise ApiError(500, update.error or "the engine failed", code="engine_error")


def usage(replies: Replies, n: int) -> Usage:
    """Count tokens; a prompt that is continued n times counts once."""
    prompt = sum(len(request.prompt) for request in replies.requests[::n])
    new = sum(replies.new_tokens)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(replies.cached_tokens[::n])),
    )


class Counts:
    """The usage that the chunks of a stream tell, as its `stream_options` ask."""

    def __init__(self, body: Generation, replies: Replies) -> None:
        options = body.stream_options
        self._always = options is not None and options.continuous_usage_stats
        self._asked = options is not None and options.include_usage
        self._replies, self._n = replies, body.n or 1

    def now(self) -> dict[str, Any]:
        """Return the field of a chunk; null where only the last chunk counts."""
        if self._always:
            return {"usage": usage(self._replies, self._n)}
        return {"usage": None} if self._asked else {}

    def last(self) -> Usage | None:
        """Return the usage of a chunk of its own, if there is one."""
        return usage(self._replies, self._n) if self._asked else None


def head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    """Return the fields that begin an answer, and all chunks of it."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.settings.name,
        "system_fingerprint": service.fingerprint,
    }
