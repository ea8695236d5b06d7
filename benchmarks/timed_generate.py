"""python -m duo_jax.generate, with the seconds of its parts written to a file.

    python -m benchmarks.timed_generate parts.json --model M --prompt "Once upon a time"

A process of benchmarks.first_token. Importing and loading are CPU-seconds; what jax says of tracing
(lowering included) and compiling (reading kept programs included) is time by the clock.
"""

import json
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

Span = tuple[float, float]

_EVENTS = {
    "trace": ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration"),
    "compile": ("backend_compile_duration",),
}  # in "/jax/core/compile"


def union(spans: Iterable[Span]) -> float:
    """Return the length of what some intervals cover: a program is traced inside of another."""
    total, covered = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, covered))
        covered = max(covered, ended)
    return total


def main() -> None:
    """Run the command on the words after the file's name."""
    began = time.process_time()  # Python's own start is the rest's
    import jax

    from duo_jax import generate
    from duo_jax.cli.model_flags import ModelFlags

    parts = {"import": time.process_time() - began, "load": 0.0}
    spans: dict[str, list[Span]] = {}
    load = ModelFlags.load

    def timed_load(flags: ModelFlags, **changes: Any) -> Any:
        began = time.process_time()
        model = load(flags, **changes)
        parts["load"] = time.process_time() - began
        return model

    def listen(event: str, duration_secs: float, **_: object) -> None:
        now = time.monotonic()
        spans.setdefault(event.split("/")[-1], []).append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    with mock.patch.object(ModelFlags, "load", timed_load):
        generate.main(sys.argv[2:])
    for part, events in _EVENTS.items():
        parts[part] = union(span for event in events for span in spans.get(event, []))
    pathlib.Path(sys.argv[1]).write_text(json.dumps(parts))


if __name__ == "__main__":
    main()
