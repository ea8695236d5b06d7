"""What Prometheus reads at /metrics, and the page at /stats."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from duo_jax.server.engine_kind import EngineKind
from duo_jax.server.replies import Replies

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
# Of the engine's own numbers: those that only grow, and those that are now.
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were read.",
    "cached_tokens": "Tokens of prompts that were not read, as they were held already.",
    "new_tokens": "Tokens written.",
    "finished": "Requests that ended.",
    "preempted": "Requests that had to give up their pages, and were read again.",
}
_GAUGES = {
    "waiting": "Requests in the queue.",
    "running": "Requests that are read or answered.",
    "pages": "Pages of the caches of retrieval heads.",
    "pages_used": "Pages that requests hold.",
    "pages_reusable": "Pages of texts that ended, kept for others that begin alike.",
    "cache_bytes": "Bytes of the pages and rings that requests hold.",
    "full_cache_bytes": "Bytes that the same tokens would take with full caches on every head.",
}


class Metrics:
    """Counts of the server, and of its engine, as Prometheus reads them.

    Args:
      engine: returns the engine, if there is one.
      ready: returns whether requests are taken.
    """

    def __init__(self, engine: Callable[[], EngineKind | None], ready: Callable[[], bool]) -> None:
        self._engine, self._ready, self._registry = engine, ready, CollectorRegistry()
        self._before: dict[str, int] = {}
        self._registry.register(self)
        self._requests = Counter(
            "duo_jax_requests",
            "Texts asked for, by why they ended.",
            ["reason"],
            registry=self._registry,
        )
        self._first = self._seconds("time_to_first_token", "Until a body's first token.")
        self._each = self._seconds("time_per_token", "Between the tokens of a text, on average.")
        self._whole = self._seconds("request", "Until a body was answered.")

    def begin(self) -> None:
        """Count what the engine does from now on."""
        self._before = {}
        self._before = {name: self.stats().get(name, 0) for name in _COUNTERS}

    def observe(self, replies: Replies) -> None:
        """Count what has ended."""
        for reason in replies.finished.values():
            self._requests.labels(reason).inc()
        if replies.ended is None or replies.first_token is None:
            return
        self._first.observe(replies.first_token - replies.began)
        self._whole.observe(replies.ended - replies.began)
        most = max(replies.new_tokens)
        if most > 1:
            self._each.observe((replies.ended - replies.first_token) / (most - 1))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def stats(self) -> dict[str, Any]:
        """Return the engine's numbers; none while there is no engine."""
        engine = self._engine()
        if engine is None:
            return {}
        found = dataclasses.asdict(engine.stats())
        return {name: value - self._before.get(name, 0) for name, value in found.items()}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the engine's numbers; the registry asks for them."""
        stats = self.stats()
        for kind, names in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for name, text in names.items():
                if name in stats:
                    yield kind(f"duo_jax_{name}", text, value=stats[name])
        yield GaugeMetricFamily("duo_jax_ready", "Requests are taken.", value=self._ready())

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"duo_jax_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)
