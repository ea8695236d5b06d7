"""An engine that answers one request at a time, from a cache of its own: simple, slow, and right.

What the paged engine writes is compared with it; the server's own tests can do without the paged
one.
"""

import dataclasses
import queue
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.api import DuoModel
from duo_jax.engine.request import (
    DrainingError,
    OnUpdate,
    QueueFullError,
    Request,
    TokenLogprob,
    Update,
)
from duo_jax.errors import InputError
from duo_jax.serve import decoding, sampling
from duo_jax.session.detokenize import Detokenizer
from duo_jax.session.session import Session


@dataclasses.dataclass
class DenseStats:
    waiting: int = 0
    running: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    cache_bytes: int = 0
    full_cache_bytes: int = 0


class DenseEngine:
    """The interface of `duo_jax.engine.engine.Engine`."""

    def __init__(self, model: DuoModel, *, max_len: int | None = None, most_waiting: int = 256):
        self.model = model
        self.max_len = max_len or model.config.architecture.max_positions
        self.gate = threading.Event()  # cleared: the engine stands still between two tokens
        self.gate.set()
        self.cancelled: set[int] = set()
        self._numbers = DenseStats()
        self._waiting: queue.Queue[tuple[int, Request, OnUpdate] | None] = queue.Queue(most_waiting)
        self._tickets = 0
        self._closed = self._draining = False
        self._idle = threading.Condition()
        self._unfinished = 0

    def submit(self, request: Request, on_update: OnUpdate) -> int:
        if self._draining:
            raise DrainingError("no more requests")
        if len(request.prompt) + request.max_tokens > self.max_len:
            raise InputError("the prompt is too long")
        if max(request.prompt) >= self.model.config.architecture.vocab_size:
            raise InputError("a token is not in the vocabulary")
        with self._idle:
            self._tickets += 1
            try:
                self._waiting.put_nowait((self._tickets, request, on_update))
            except queue.Full:
                raise QueueFullError("256 requests wait") from None
            self._unfinished += 1
            return self._tickets

    def cancel(self, ticket: int) -> None:
        self.cancelled.add(ticket)

    def run(self) -> None:
        while not self._closed and (asked := self._waiting.get()) is not None:
            ticket, request, on_update = asked
            try:
                self._answer(ticket, request, on_update)
            except InputError as error:
                on_update(Update(finish_reason="error", error=str(error)))
            with self._idle:
                self._unfinished -= 1
                self._numbers.finished += 1
                self._idle.notify_all()

    def drain(self, timeout: float | None = None) -> None:
        self._draining = True
        with self._idle:
            self._idle.wait_for(lambda: self._unfinished == 0, timeout)

    def close(self) -> None:
        self._draining = self._closed = True
        self._waiting.put(None)

    def stats(self) -> DenseStats:
        waiting = self._waiting.qsize()
        running = self._unfinished - waiting
        return dataclasses.replace(self._numbers, waiting=waiting, running=running)

    def _answer(self, ticket: int, request: Request, on_update: OnUpdate) -> None:
        session = Session(self.model.runtime, max_len=self.max_len)
        prompt, first = list(request.prompt), None
        self._numbers.prompt_tokens += len(prompt)
        if request.prompt_logprobs is None:
            session.append([prompt])
        else:  # token by token: logits of every place are needed
            found: list[TokenLogprob | None] = [None]
            for token, after in zip(prompt, [*prompt[1:], None], strict=True):
                session.append([[token]])
                if after is not None:
                    found.append(logprob(_logits(session), after, request.prompt_logprobs))
            first = tuple(found)
        text = Detokenizer(
            self.model.tokenizer,
            context=prompt if request.continues else (),
            stop=request.stop,
            skip_special_tokens=request.skip_special_tokens,
        )
        own = () if request.ignore_eos else self.model.tokenization.stop_tokens
        ends = {*own, *request.stop_tokens}
        if request.max_tokens == 0:
            on_update(Update(prompt_logprobs=first, finish_reason="length"))
            return
        written: list[int] = []
        while True:
            self.gate.wait()
            if ticket in self.cancelled or self._closed:
                on_update(Update(finish_reason="cancelled"))
                return
            logits = _logits(session)
            token = _draw(logits, request, written)
            written.append(token)
            if request.token_filter is not None:
                request.token_filter.accept(token)
            session.append([[token]])
            piece = "" if token in ends else text.push([token])
            reason = None
            if token in ends or text.stopped:
                reason = "stop"
            elif len(written) == request.max_tokens:
                reason = "length"
            if reason is not None:
                piece += text.finish()
            self._numbers.new_tokens += 1
            on_update(
                Update(
                    text=piece,
                    tokens=(token,),
                    logprobs=()
                    if request.logprobs is None
                    else (logprob(logits, token, request.logprobs),),
                    prompt_logprobs=first,
                    finish_reason=reason,
                )
            )
            first = None
            if reason is not None:
                return


def logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """Return the log-probability of a token, and of the most likely ones."""
    found = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    best = np.argsort(-found, kind="stable")[:count]
    return TokenLogprob(
        token=token,
        logprob=float(found[token]),
        top=tuple((int(i), float(found[i])) for i in best),
    )


def _logits(session: Session) -> np.ndarray:
    return np.array(session.snapshot().logits[0], np.float32)


def _draw(logits: np.ndarray, request: Request, written: list[int]) -> int:
    logits = logits.copy()
    for token, bias in request.logit_bias.items():
        logits[token] += bias
    counts = np.bincount(written, minlength=logits.size)[: logits.size]
    logits -= request.presence_penalty * (counts > 0) + request.frequency_penalty * counts
    if request.token_filter is not None:
        words: Any = request.token_filter.allowed()
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.size]
        logits[allowed == 0] = -np.inf
    options = request.sampling.options()
    tokens = [*request.prompt, *written]
    seen = sampling.seen_tokens([tokens], logits.size)
    key = decoding.row_rng_keys(request.seed, request.choice + 1)[-1:]
    keys = jax.vmap(jax.random.fold_in)(key, jnp.array([len(tokens)]))
    return int(sampling.sample(jnp.asarray(logits, jnp.float32)[None], options, keys, seen)[0])
