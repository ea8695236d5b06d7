"""The engine: many requests at the same time, which join and leave between steps.

    engine = Engine(duo_jax.load("demo"))
    engine.submit(Request(prompt=tokens, max_tokens=100), on_update=print)
    while engine.step():
        pass

Or one thread is in `run`, and others submit and cancel. Updates arrive in the thread that steps.
"""

import dataclasses
import itertools
import pathlib
import sys
import threading
import time
import traceback

from duo_jax.api import DuoModel
from duo_jax.engine.request import DrainingError, OnUpdate, QueueFullError, Request, Update
from duo_jax.engine.scheduler import Scheduler
from duo_jax.engine.sizes import bytes_of, choose_sizes
from duo_jax.engine.text import Text, new_text
from duo_jax.errors import InputError
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Size
from duo_jax.session.limits import Limits

_LONGEST_WAIT = 60.0  # seconds between two looks of a thread that has nothing to do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Where an engine stands. Tokens and requests are counted from its start."""

    waiting: int
    running: int  # requests that are read or written
    pages: int
    pages_used: int  # by requests that have not ended
    pages_reusable: int  # by kept prefixes alone
    prompt_tokens: int  # read
    cached_tokens: int  # not read, as a prefix was kept
    new_tokens: int
    finished: int
    preempted: int
    cache_bytes: int  # of the pages and rings in use
    full_cache_bytes: int  # of as many tokens, if every head had a full cache
    page_tokens: int
    page_bytes: int
    full_page_bytes: int  # if every head had a full cache
    ring_bytes: int  # of one request


class Engine:
    """Serves requests with one model.

    Args:
      model: from duo_jax.load. Prompts are read in the mode "exact"; no tokens are evicted.
      max_requests: requests that are read or written at a time; others wait.
      max_len: tokens of a request, prompt and answer; default: the model's range, or what fits.
      cache_tokens: tokens that the caches of retrieval heads hold, over all requests and kept
        prefixes; default: a share of the free memory (`duo_jax.engine.sizes`).
      page_size: tokens of a page, a power of two from 64.
      queue: requests that may wait.
      prefix_reuse: whether beginnings of texts are kept for later requests.
      snapshots: prefixes that are kept at most.
      prefill_chunk: tokens of a prompt that are read between two tokens of running requests;
        default: 1,024, or the model's if that is less.

    Raises:
      InputError: an argument cannot be used, the model is not one to be served, or there is too
        little memory.
    """

    def __init__(
        self,
        model: DuoModel,
        *,
        max_requests: int = 16,
        max_len: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = 64,
        queue: int = 256,
        prefix_reuse: bool = True,
        snapshots: int = 32,
        prefill_chunk: int | None = None,
    ) -> None:
        runtime = model.runtime
        if runtime.keep < 1:
            raise InputError("an engine does not evict tokens: load the model without keep")
        if runtime.prefill_mode != "exact":
            raise InputError(
                f'prefill mode "{runtime.prefill_mode}" depends on how a prompt is cut, which an '
                'engine decides: load the model with "exact"'
            )
        architecture = runtime.config.architecture
        if architecture.rope.kind == "dynamic":
            raise InputError(
                "rope type dynamic turns keys by the length of the whole text: an engine, which "
                "shares and rereads texts in part, cannot serve it"
            )
        prefix_reuse = argument("prefix_reuse", prefix_reuse, bool)
        self.model = model
        self.sizes = choose_sizes(
            runtime,
            max_requests=max_requests,
            max_len=max_len,
            cache_tokens=cache_tokens,
            page_size=page_size,
            snapshots=snapshots if prefix_reuse else 0,
            prefill_chunk=prefill_chunk,
        )
        self._queue = argument("queue", queue, Size)
        self._limits = Limits(architecture=architecture, max_len=self.sizes.max_len)
        self._page_bytes, self._ring_bytes = bytes_of(runtime, page_size=self.sizes.page_size)
        self._full_page_bytes, _ = bytes_of(runtime, page_size=self.sizes.page_size, full=True)
        self._scheduler = Scheduler(runtime, self.sizes, reuse=prefix_reuse)
        self._tickets = itertools.count()
        self._pinned: list[pathlib.Path] = []
        self._changed = threading.Condition()
        # Guarded by it:
        self._new: list[Text] = []
        self._cancelled: set[int] = set()
        self._draining = self._closed = False
        self._idle = True

    @property
    def max_len(self) -> int:
        """Tokens of a request, prompt and answer."""
        return self.sizes.max_len

    def submit(self, request: Request, on_update: OnUpdate) -> int:
        """Let a request wait for its turn; return its ticket.

        Args:
          request: what to continue.
          on_update: called with every update, in the thread that steps. If it raises, the request
            is cancelled.

        Raises:
          InputError: the request cannot be served.
          QueueFullError: too many wait.
          DrainingError: the engine ends.
        """
        self._check(request)
        ticket = next(self._tickets)

        listening = True

        def send(update: Update) -> None:
            nonlocal listening
            try:
                if listening:
                    on_update(update)
            except Exception:
                listening = False
                traceback.print_exc()
                self.cancel(ticket)

        tokenization = self.model.tokenization
        text = new_text(ticket, request, send, tokenization.tokenizer, tokenization.stop_tokens)
        with self._changed:
            if self._draining:
                raise DrainingError("the server is about to end")
            if len(self._new) + len(self._scheduler.waiting) >= self._queue:
                raise QueueFullError(f"{self._queue:,} requests are waiting already")
            self._new.append(text)
            self._idle = False
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request; nothing happens if it has ended."""
        with self._changed:
            self._cancelled.add(ticket)
            self._changed.notify_all()

    def pin(self, folder: str | pathlib.Path) -> int:
        """Keep a saved text (`Conversation.save`, `generate --save-cache`) as long as the engine.

        Requests that begin with it need not read it. Not while another thread steps.

        Args:
          folder: where it was saved, with the same model, heads and KV format.

        Returns:
          Its tokens.

        Raises:
          InputError: the folder cannot be used, or there is too little room beside a request of
            `max_len` tokens.
        """
        folder = pathlib.Path(folder)
        length = self._pin(folder)
        if folder not in self._pinned:
            self._pinned.append(folder)
        return length

    def _pin(self, folder: pathlib.Path) -> int:
        session = self.model.load_conversation(folder).session
        assert session.cache is not None
        [length] = session.cache.lengths.tolist()
        if not self._scheduler.pin(session.tokens[0][:length], session.cache):
            sizes = self.sizes
            raise InputError(
                f"{folder}: its {length:,} tokens do not fit beside a request of {self.max_len:,}: "
                f"the cache has room for {sizes.num_pages * sizes.page_size:,} tokens and "
                f"{sizes.snapshots:,} snapshots"
            )
        return length

    def step(self) -> bool:
        """Do a little for all requests; return whether any is left.

        Reads one chunk of one prompt and writes one token of every running request. A failure ends
        all requests with an error; those that come later are served.
        """
        scheduler = self._scheduler
        with self._changed:
            scheduler.waiting.extend(self._new)
            self._new.clear()
            cancelled, self._cancelled = self._cancelled, set()
        try:
            if cancelled:
                for text in scheduler.texts:
                    if text.ticket in cancelled:
                        scheduler.end(text, "cancelled")
            scheduler.step()
        except Exception:
            traceback.print_exc()
            print("error: a step failed; all requests were ended", file=sys.stderr)
            scheduler.fail("the server failed in the middle of this request")
            self._pin_again()
        with self._changed:
            self._idle = not (scheduler.texts or self._new)
            if self._idle:
                self._changed.notify_all()
            return not self._idle

    def run(self) -> None:
        """Step until the engine is closed; wait where there is nothing to do."""
        while True:
            with self._changed:
                while self._idle and not (self._closed or self._new):
                    self._changed.wait(_LONGEST_WAIT)
                if self._closed:
                    break
            self.step()
        with self._changed:
            unseen, self._new = self._new, []
        for text in [*self._scheduler.texts, *unseen]:
            self._scheduler.end(text, "cancelled")

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those there are; return whether all have ended.

        Args:
          timeout: seconds to wait at most; another thread has to be in `run`.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._draining = True
            return self._changed.wait_for(
                lambda: self._idle, None if end is None else max(end - time.monotonic(), 0)
            )

    def close(self) -> None:
        """Take no more requests, and cancel those there are."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()

    def stats(self) -> Stats:
        """Return where the engine stands; may be called from any thread."""
        scheduler = self._scheduler
        counts = scheduler.counts
        pages, reusable = scheduler.pool.num_pages, scheduler.prefixes.num_pages
        used = pages - scheduler.pool.num_free - reusable
        running = len(scheduler.running) + (scheduler.reading is not None)
        return Stats(
            waiting=len(scheduler.waiting) + len(self._new),
            running=running,
            pages=pages,
            pages_used=used,
            pages_reusable=reusable,
            prompt_tokens=counts["prompt_tokens"],
            cached_tokens=counts["cached_tokens"],
            new_tokens=counts["new_tokens"],
            finished=counts["finished"],
            preempted=counts["preempted"],
            cache_bytes=used * self._page_bytes + running * self._ring_bytes,
            full_cache_bytes=used * self._full_page_bytes,
            page_tokens=self.sizes.page_size,
            page_bytes=self._page_bytes,
            full_page_bytes=self._full_page_bytes,
            ring_bytes=self._ring_bytes,
        )

    def check(self) -> None:
        """Assert that the engine's books are in order; for tests."""
        self._scheduler.check()

    def _pin_again(self) -> None:
        """Read what was pinned into caches that are empty after a failure."""
        for folder in self._pinned:
            try:
                self._pin(folder)
            except InputError as error:
                print(f"error: {error}; it is no longer kept", file=sys.stderr)

    def _check(self, request: Request) -> None:
        """Refuse a request that could never be served.

        Raises:
          InputError: it is too long, or has a token that the vocabulary does not.
        """
        self._limits.check([request.prompt])
        size = len(request.prompt) + request.max_tokens
        if size > self.max_len:
            raise InputError(
                f"{len(request.prompt):,} tokens and {request.max_tokens:,} new ones are more than "
                f"the {self.max_len:,} that a request may have"
            )
        vocab_size = self.model.config.architecture.vocab_size
        for token in (*request.logit_bias, *request.stop_tokens):
            if not 0 <= token < vocab_size:
                raise InputError(f"token {token:,} is not one of the model's {vocab_size:,}")
