"""Timing of prefill and decoding, without the time that jax spends compiling."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Timing:
    """Totals since a session began."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0  # not part of the above

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        """Count the block's time as prefill."""
        with self._measured("prefill_seconds"):
            yield

    @contextlib.contextmanager
    def decode(self) -> Iterator[None]:
        """Count the block's time as decoding."""
        with self._measured("decode_seconds"):
            yield

    @contextlib.contextmanager
    def _measured(self, field: str) -> Iterator[None]:
        began, compiled = time.monotonic(), _compile.seconds
        yield
        seconds = time.monotonic() - began
        compiling = min(seconds, _compile.seconds - compiled)
        self.compile_seconds += compiling
        setattr(self, field, getattr(self, field) + seconds - compiling)


class _Compile:
    """Seconds that jax has spent tracing and compiling in this process."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


_compile = _Compile()
jax.monitoring.register_event_duration_secs_listener(_compile)
