"""What the server needs of an engine: `duo_jax.engine.engine.Engine`, or a small one of tests."""

from typing import Any, Protocol, runtime_checkable

from duo_jax.api import DuoModel
from duo_jax.engine.request import OnUpdate, Request


@runtime_checkable
class EngineKind(Protocol):
    """Answers requests in a thread of its own."""

    model: DuoModel

    @property
    def max_len(self) -> int:
        """Tokens of a request, prompt and answer."""
        ...

    def submit(self, request: Request, on_update: OnUpdate) -> int:
        """Take a request, from any thread; return its ticket."""
        ...

    def cancel(self, ticket: int) -> None:
        """End a request, from any thread."""
        ...

    def run(self) -> None:
        """Answer requests until the engine is closed."""
        ...

    def drain(self, timeout: float | None = None) -> Any:
        """Take no more requests, and wait for those that run."""
        ...

    def close(self) -> None:
        """End at once."""
        ...

    def stats(self) -> Any:
        """Return numbers, in a dataclass."""
        ...
