"""Answers that end with their client: server-sent events, and work that nobody else waits for."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duo_jax.server.errors import as_api_error

Result = TypeVar("Result")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect it
]
_DONE = b"data: [DONE]\n\n"
GONE = 499  # nginx' status for a client that has gone; it never arrives


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return what a coroutine returns; end it, and return None, when the client goes away."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A stream of JSON objects, ending in [DONE].

    Args:
      chunks: the objects; only what was set in them is sent. An exception becomes the last object.
      close: called at the end, however that comes.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel], close: Callable[[], None]) -> None:
        self._chunks, self._close = chunks, close
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        del scope
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                async for chunk in self._chunks:
                    await _event(send, chunk.model_dump_json(exclude_unset=True).encode())
            except Exception as error:
                await _event(send, json.dumps(as_api_error(error).body()).encode())
            await send({"type": "http.response.body", "body": _DONE, "more_body": False})


async def _event(send: Send, data: bytes) -> None:
    event = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
