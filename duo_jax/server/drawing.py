"""From a body to the engine's requests: how tokens are drawn, and what ends the text."""

import secrets
from typing import Any

from duo_jax.engine.request import Request
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.server.errors import ApiError
from duo_jax.server.grammar import json_filter
from duo_jax.server.schema import Generation
from duo_jax.server.service import Service

_SEEDS = 2**32


def requests(
    body: Generation,
    prompts: list[list[int]],
    service: Service,
    *,
    max_tokens: int | None,
    **more: Any,
) -> list[Request]:
    """Return the requests of a body: n for each prompt, in the order of OpenAI's indices.

    Args:
      body: how the answers are written.
      prompts: tokens of each prompt.
      service: the engine, and the defaults.
      max_tokens: new tokens of an answer at most; None: as many as there is room for.
      **more: fields of `Request`.

    Raises:
      ApiError: something cannot be done, or asks for more than the model has room for.
      InputError: a value cannot be used.
    """
    n = body.n or 1
    _check(body, len(prompts) * n, service.settings.most_texts)
    same: dict[str, Any] = {
        "sampling": sampling(body, service.settings.sampling),
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": _logit_bias(body.logit_bias, service.vocabulary.size),
        "stop": _stop(body),
        "stop_tokens": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "skip_special_tokens": body.skip_special_tokens is not False,
        **more,
    }
    filter_ = json_filter(body.response_format, service.vocabulary)
    made = []
    for prompt in prompts:
        # Negative seeds, which OpenAI's clients may send, count from the end.
        seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS
        made += [
            Request(
                prompt=tuple(prompt),
                max_tokens=room(prompt, max_tokens, service.engine.max_len),
                seed=seed,
                choice=choice,
                token_filter=None if filter_ is None else filter_.copy(),
                **same,
            )
            for choice in range(n)
        ]
    return made


def room(prompt: list[int], max_tokens: int | None, max_len: int) -> int:
    """Return how many tokens may be written after a prompt.

    Raises:
      ApiError: not so many as were asked for, or none.
    """
    left = max_len - len(prompt)
    wanted = 1 if max_tokens is None else max_tokens
    if left >= wanted:
        return left if max_tokens is None else max_tokens
    raise ApiError(
        400,
        f"the model's range is {max_len:,} tokens here; the prompt has {len(prompt):,}, and "
        f"{wanted:,} more were asked for",
        code="context_length_exceeded",
    )


def sampling(body: Generation, default: SamplingConfig) -> SamplingConfig:
    """Return how tokens are drawn: as the body says, or by default."""

    def said(name: str) -> Any:
        value = getattr(body, name)
        return getattr(default, name) if value is None else value

    top_k = said("top_k")
    return SamplingConfig(
        temperature=float(said("temperature")),
        top_k=0 if top_k == -1 else top_k,
        top_p=said("top_p"),
        min_p=said("min_p"),
        repetition_penalty=said("repetition_penalty"),
    )


def _check(body: Generation, texts: int, most: int) -> None:
    if texts > most:
        raise ApiError(400, f"{texts:,} texts are asked for at once; at most {most:,} can be")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options belong to a stream", param="stream_options")
    if body.ignore_eos and body.response_format and body.response_format.type != "text":
        raise ApiError(400, "ignore_eos would go on after the JSON has ended", param="ignore_eos")


def _stop(body: Generation) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    found = {}
    for name, value in (bias or {}).items():
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 11 else vocab_size
        if number >= vocab_size:
            message = f"logit_bias: {name[:40]!r} is not the number of one of {vocab_size:,} tokens"
            raise ApiError(400, message, param="logit_bias")
        found[number] = float(value)
    return found
