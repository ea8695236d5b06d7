"""A load of streaming clients on a server with OpenAI's completions, and what they saw."""

import concurrent.futures
import dataclasses
import http.client
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_TIMEOUT = 600  # seconds without a byte


class LoadError(RuntimeError):
    """A server refused a request, or answered something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What one request saw; times are seconds from its start."""

    chunks: list[float]  # times of pieces of text
    tokens: int  # new ones, as the server counts them, or the pieces
    prompt_tokens: int | None
    cached_tokens: int | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What all clients saw."""

    clients: int
    requests: int
    seconds: float
    new_tokens: int
    tokens_per_second: float
    first_token: tuple[float, float]  # seconds: median, 95th percentile
    between_tokens: tuple[float, float]
    longest_pause: float  # in a running stream
    prompt_tokens: int | None
    cached_tokens: int | None


def run(port: int, *, model: str, prompts: Sequence[str], clients: int, max_tokens: int) -> Load:
    """Ask for all prompts; each client asks for its next one when it has its answer.

    Args:
      port: of the server, on this machine.
      model: its name there.
      prompts: in the order in which they are asked.
      clients: requests under way at a time.
      max_tokens: new tokens of each.

    Raises:
      LoadError: a request failed.
    """
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        ask = [pool.submit(_ask, port, model, prompt, max_tokens) for prompt in prompts]
        seen = [each.result() for each in ask]
    seconds = time.monotonic() - began
    several = [np.diff(each.chunks) for each in seen if len(each.chunks) > 1]
    if not several:
        raise LoadError("no answer came in two pieces, so there is no time between tokens")
    gaps = np.concatenate(several)
    tokens = sum(each.tokens for each in seen)

    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return Load(
        clients=clients,
        requests=len(seen),
        seconds=seconds,
        new_tokens=tokens,
        tokens_per_second=tokens / seconds,
        first_token=_spread([each.chunks[0] for each in seen]),
        between_tokens=_spread(gaps),
        longest_pause=float(np.max(gaps)),
        prompt_tokens=total([each.prompt_tokens for each in seen]),
        cached_tokens=total([each.cached_tokens for each in seen]),
    )


def _spread(values: Any) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 95))


def _ask(port: int, model: str, prompt: str, max_tokens: int) -> Seen:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, chunks, usage = time.monotonic(), [], {}
    for event in _events(port, body):
        choices = event.get("choices") or []
        if choices and choices[0].get("text"):
            chunks.append(time.monotonic() - began)
        usage = event.get("usage") or usage
    if not chunks:
        raise LoadError("an answer has no text")
    details = usage.get("prompt_tokens_details") or {}
    return Seen(
        chunks=chunks,
        tokens=usage.get("completion_tokens") or len(chunks),
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=details.get("cached_tokens"),
        seconds=time.monotonic() - began,
    )


def _events(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a streamed answer's events hold."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise LoadError(f"status {answer.status}: {answer.read(500).decode(errors='replace')}")
        for line in answer:
            data = line.decode().strip()
            if data == "data: [DONE]":
                return
            if data.startswith("data:"):
                event = json.loads(data.removeprefix("data:"))
                if "error" in event:
                    raise LoadError(str(event["error"]))
                yield event
    finally:
        connection.close()
