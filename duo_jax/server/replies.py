"""Replies to the requests of one HTTP body, as they come from the engine's thread."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence

from duo_jax.engine.request import Request, Update
from duo_jax.server.engine_kind import EngineKind


class Replies:
    """The updates of several requests, in one queue.

    Args:
      engine: answers the requests.
      loop: where the updates are read.
      on_end: called once, in the loop, when nothing more is wanted.
    """

    def __init__(
        self,
        engine: EngineKind,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[["Replies"], None],
    ) -> None:
        self.requests: list[Request] = []
        self.finished: dict[int, str] = {}
        """Why each request ended, so far."""
        self.new_tokens: list[int] = []
        self.cached_tokens: list[int] = []
        self.began = time.perf_counter()
        self.first_token: float | None = None
        self.ended: float | None = None
        self._engine, self._loop, self._on_end = engine, loop, on_end
        self._tickets: list[int] = []
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask all requests, before the first update is read; in any thread.

        Raises:
          InputError, QueueFullError, DrainingError: as `Engine.submit`.
        """
        for index, request in enumerate(requests):
            ticket = self._engine.submit(request, functools.partial(self._put, index))
            self._tickets.append(ticket)
            self.requests.append(request)
            self.new_tokens.append(0)
            self.cached_tokens.append(0)
            if self.ended is not None:  # closed meanwhile
                self._engine.cancel(ticket)
                return

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the number of a request and an update, until every request has ended."""
        while len(self.finished) < len(self.requests):
            index, update = await self._queue.get()
            if index in self.finished:
                continue
            if self.first_token is None and (update.tokens or update.finish_reason):
                self.first_token = time.perf_counter()
            self.new_tokens[index] += len(update.tokens)
            self.cached_tokens[index] = max(self.cached_tokens[index], update.cached_tokens)
            if update.finish_reason is not None:
                self.finished[index] = update.finish_reason
            yield index, update

    def fail(self, message: str) -> None:
        """Have every request that has not ended end with an error; for any thread."""
        for index in range(len(self.requests)):
            self._put(index, Update(finish_reason="error", error=message))

    def close(self) -> None:
        """End what has not ended: nobody waits for it any more."""
        if self.ended is not None:
            return
        self.ended = time.perf_counter()
        for index, ticket in enumerate(self._tickets):
            if index not in self.finished:
                self._engine.cancel(ticket)
                self.finished[index] = "cancelled"
        self._on_end(self)

    def _put(self, index: int, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, update))
