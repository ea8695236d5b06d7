"""A program of the serving stage: decoding or prefill with one way to split a model."""

import abc
import dataclasses
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.models import Published
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.tables import Table
from benchmarks.serving.variants import Variant
from duo_jax.cache import cache_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(abc.ABC):
    """A way to split a model, at one kind of work; subclasses say which."""

    settings: Settings
    published: Published
    variant: Variant

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in lists of what was not reached, and of failures."""

    @property
    @abc.abstractmethod
    def max_len(self) -> int:
        """Tokens that its caches have room for."""

    @abc.abstractmethod
    def floor(self) -> float:
        """Return the bytes or operations that its longest text takes at least."""

    @abc.abstractmethod
    def expected_seconds(self, table: Table) -> float:
        """Guess how long it will be measured, from the rows there are."""

    @abc.abstractmethod
    def compile(self) -> Any:
        """Compile it, without arrays; the result tells its `temp_bytes`."""

    @abc.abstractmethod
    def measure(self, compiled: Any, params: dict[str, Any], table: Table) -> None:
        """Add its rows."""

    def needed_bytes(self) -> int:
        """Return the bytes of its parameters and caches."""
        params = models.param_bytes(self.published.architecture, self.settings.dtype)
        return params + self.cache_bytes(self.max_len)

    def cache_bytes(self, max_len: int) -> int:
        """Return the bytes of caches with room for `max_len` tokens."""
        return cache_bytes(
            self.variant.config, batch_size=1, max_len=max_len, dtype=self.settings.dtype
        )
