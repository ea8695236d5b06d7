"""What all requests share: the engine, which a thread loads and runs, and its state."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from duo_jax.engine.request import Request
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.server.engine_kind import EngineKind
from duo_jax.server.errors import ApiError
from duo_jax.server.metrics import Metrics
from duo_jax.server.replies import Replies
from duo_jax.server.vocabulary import Vocabulary

_log = logging.getLogger("duo_jax.server")

Status = Literal["loading", "ready", "draining", "failed"]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server is told, beside what the engine is."""

    name: str
    """Of the model, for clients."""
    root: str
    """Where the model is from."""
    sampling: SamplingConfig = dataclasses.field(
        default_factory=functools.partial(SamplingConfig, temperature=1.0)
    )
    """Where a request does not say how tokens are drawn."""
    keys: frozenset[str] = frozenset()
    most_bytes: int = 16 * 2**20
    """Of a body."""
    most_texts: int = 256
    """That one body may ask for: prompts times n."""


class Service:
    """The engine behind the routes.

    Args:
      settings: of the server.
      make_engine: loads the model; called in a thread of its own.
      on_ready: called there when requests are answered.
      on_failure: called there when the model cannot be loaded, or the engine fails.
    """

    def __init__(
        self,
        settings: Settings,
        make_engine: Callable[[], EngineKind],
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics(lambda: self.running, lambda: self.status == "ready")
        self.status: Status = "loading"
        self.error: BaseException | None = None
        self._make_engine = make_engine
        self._on_ready, self._on_failure = on_ready, on_failure
        self._engine: EngineKind | None = None
        self._vocabulary: Vocabulary | None = None
        self._open: set[Replies] = set()
        # Tokenizers are not made for several threads; one keeps the event loop free.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "tokenizing")
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model, and run the engine, in the background."""
        self.thread.start()

    @property
    def engine(self) -> EngineKind:
        """The engine; it answers what is not generation while the server drains, too.

        Raises:
          ApiError: there is none yet, or none any more.
        """
        if self.status == "failed":
            raise ApiError(503, "the engine failed; the server's log says why", code="failed")
        if self._engine is None:
            raise ApiError(503, "the model is being loaded", code="loading")
        return self._engine

    @property
    def running(self) -> EngineKind | None:
        """The engine, if there is one."""
        return None if self.status == "failed" else self._engine

    @property
    def vocabulary(self) -> Vocabulary:
        """The texts of the model's tokens."""
        assert self._vocabulary is not None
        return self._vocabulary

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model, split and order of heads from others."""
        return f"duo_{self.engine.model.runtime.weights_digest[:12]}"

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
          ApiError: it is not, or none is yet.
        """
        engine = self.engine  # 503 comes before 404
        if engine and name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r}; this server has {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    async def submit(self, requests: Sequence[Request]) -> Replies:
        """Hand requests to the engine, all or none.

        Raises:
          ApiError: there is no engine, or the server ends.
          InputError, QueueFullError, DrainingError: as `Engine.submit`.
        """
        engine = self.engine
        if self.status == "draining":
            raise ApiError(503, "the server ends, and takes no more requests", code="draining")
        replies = Replies(engine, asyncio.get_running_loop(), on_end=self._ended)
        self._open.add(replies)
        try:
            await self.tokenizing(replies.submit, requests)
        except BaseException:
            replies.close()
            raise
        return replies

    async def tokenizing(self, function: Callable[..., Result], *args: Any, **named: Any) -> Result:
        """Run what tokenizes, or takes long otherwise, beside the event loop."""
        call = functools.partial(function, *args, **named)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that run; then end the engine."""
        if self.status == "failed":
            return
        self.status = "draining"
        if self._engine is not None:
            self._engine.drain(seconds)
            self._engine.close()

    def _ended(self, replies: Replies) -> None:
        self._open.discard(replies)
        self.metrics.observe(replies)

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            self._vocabulary = Vocabulary(engine.model)
            self._engine = engine
            _ = self.fingerprint  # reads all weights, which is not for the event loop to wait for
            self.metrics.begin()
            if self.status == "loading":
                self.status = "ready"
                self._on_ready()
            engine.run()
        except BaseException as error:
            self.status, self.error = "failed", error
            if self._engine is not None:
                _log.exception("the engine failed")
            for replies in list(self._open):
                replies.fail("the engine failed")
            self._on_failure()
