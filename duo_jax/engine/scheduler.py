"""Which request is read or written next, in which row, and where its pages come from.

A step reads a chunk of one prompt, then writes a token of every running text. Prompts are read in
the order in which they came; one is begun when a row and pages for all of it are there. Where pages
run out, kept prefixes are forgotten first; then the text that was begun last gives up its pages,
and is read again, with what it has written, when there is room. So the oldest text always goes on.
"""

import bisect
import collections
from collections.abc import Iterator

import numpy as np

from duo_jax.cache import Cache
from duo_jax.engine.device import Device, PromptScores
from duo_jax.engine.page_pool import PagePool
from duo_jax.engine.prefixes import Prefix, Prefixes, digests_of
from duo_jax.engine.request import FinishReason, TokenLogprob
from duo_jax.engine.rows import Rows
from duo_jax.engine.sizes import Sizes
from duo_jax.engine.text import Text
from duo_jax.serve.row_sampling import Sampled
from duo_jax.session.runtime import Runtime

_WIDTHS = (64, 256)  # of a chunk that is short; every width is a program
_OVERFLOW = "numbers of the model became infinite or undefined in this text; float32 has more room"


class Scheduler:
    """All requests of an engine; used by one thread.

    Args:
      runtime: the model.
      sizes: of its caches.
      reuse: whether prefixes are kept.
    """

    def __init__(self, runtime: Runtime, sizes: Sizes, *, reuse: bool) -> None:
        self.waiting: collections.deque[Text] = collections.deque()
        self.reading: Text | None = None
        self.running: dict[int, Text] = {}  # by row, in the order in which they were begun
        self.counts: collections.Counter[str] = collections.Counter()
        self._sizes, self._reuse = sizes, reuse
        self._device = Device(
            runtime,
            rows=sizes.max_requests,
            snapshots=sizes.snapshots,
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            max_len=sizes.max_len,
        )
        self._begin()

    def _begin(self) -> None:
        sizes = self._sizes
        snapshots = range(sizes.max_requests, sizes.max_requests + sizes.snapshots)
        self.pool = PagePool(sizes.num_pages)
        self.prefixes = Prefixes(self.pool, snapshots, sizes.page_size)
        self._rows = Rows(self._device, sizes)

    @property
    def texts(self) -> list[Text]:
        """All texts that have not ended."""
        reading = [] if self.reading is None else [self.reading]
        return [*self.running.values(), *reading, *self.waiting]

    def step(self) -> bool:
        """Read a chunk, write a token of every running text; return whether there was any."""
        read = self._read()
        return self._write() or read

    def end(self, text: Text, reason: FinishReason, error: str | None = None) -> None:
        """End a text before its time."""
        if text in self.waiting:
            self.waiting.remove(text)
        text.end(reason, error)
        self._finish(text)

    def fail(self, error: str) -> None:
        """End all texts with an error, and begin anew with empty caches."""
        for text in self.texts:
            text.end("error", error)
        self.waiting.clear()
        self.reading, self.running = None, {}
        self._begin()
        self._device.clear()

    def pin(self, tokens: list[int], cache: Cache) -> bool:
        """Keep a text for good, whose own cache is given; return whether there is room for it."""
        digests = digests_of(tokens, self._sizes.page_size)
        if self.prefixes.has(tokens, digests, pinned=True):
            return True
        needed, pinned = self._page_count(len(tokens)), self.prefixes.num_pinned_pages
        request = self._page_count(self._sizes.max_len)
        if needed + pinned + request > self._sizes.num_pages or not self.prefixes.make_room(needed):
            return False
        pages = self.pool.take(needed)
        row = self.prefixes.add(tokens, digests, pages, pinned=True)
        self.pool.release(pages)  # the prefix holds them
        if row is None:
            return False
        self._device.adopt(cache, pages, row)
        return True

    def check(self) -> None:
        """Assert that no page is lost or held twice by mistake."""
        holders = np.zeros(self._sizes.num_pages, np.int64)
        owners = [text.pages for text in self.texts] + [p.pages for p in self.prefixes]
        for pages in owners:
            assert len(set(pages)) == len(pages)
            holders[list(pages)] += 1
        np.testing.assert_array_equal(holders, self.pool.holders)
        assert self.pool.num_free == int(np.sum(holders == 0))
        kept = sum(1 for _ in self.prefixes)
        assert kept + self.prefixes.num_free_rows == self._sizes.snapshots
        for row, text in self.running.items():
            assert text.row == row
            assert text.held == len(text.tokens) - 1
            assert self._page_count(text.held) <= len(text.pages)
            assert set(self._rows.table[row]) <= set(text.pages)

    # Reading

    def _read(self) -> bool:
        """Read the next chunk of a prompt, if there is one that can be read."""
        if self.reading is None and not (self.waiting and self._admit(self.waiting[0])):
            return False
        text = self.reading
        assert text is not None
        assert text.row is not None
        start, total = text.held, len(text.tokens)
        border = bisect.bisect_right(text.borders, start)
        border = text.borders[border] if border < len(text.borders) else total
        end = min(start + self._sizes.prefill_chunk, border, total)
        scored = text.request.prompt_logprobs is not None and not text.begun
        logits, scores = self._device.prefill(
            text.row,
            text.tokens[start:end],
            width=self._width(end - start),
            start=start,
            total=total,
            table=self._rows.table[text.row],
            targets=text.tokens[start + 1 : end + 1] if scored else None,
        )
        self.counts["prompt_tokens"] += end - start
        text.held = end
        if not np.isfinite(np.asarray(logits)).all():
            self._spoiled(text)
            return True
        if scores is not None:
            _add_prompt_scores(text, start, scores)
        if end < total:
            if end % self._sizes.page_size == 0:
                self._keep(text)
            return True
        self.reading = None
        if text.request.max_tokens == 0:
            text.end("length")
            self._finish(text)
            return True
        self.running[text.row] = text
        one = slice(text.row, text.row + 1)
        sampled = self._rows.sample(logits, one, np.ones(1, bool), self.running)
        self._wrote(text, sampled, 0)
        return True

    def _admit(self, text: Text) -> bool:
        """Give the first text that waits a row and its pages, if they are there."""
        row = next((r for r in range(self._sizes.max_requests) if r not in self.running), None)
        if row is None:
            return False
        size = self._sizes.page_size
        if not text.digests:
            text.digests = digests_of(text.tokens, size)
        scored = text.request.prompt_logprobs is not None and not text.begun
        reuse = self._reuse and not scored
        prefix = self.prefixes.find(text.tokens, text.digests) if reuse else None
        pages = self._pages_for(text, prefix)
        if pages is None and prefix is not None and not self.running:
            # The prefix itself may be what takes the room: its last page, which is copied.
            prefix, pages = None, self._pages_for(text, None)
        if pages is None:
            return False
        text.pages = pages
        text.row, text.held = row, 0
        if prefix is not None:
            self._restore(text, prefix)
        self.waiting.popleft()
        self.reading = text
        if not text.begun:  # read again, it finds what it has left itself
            before = text.held if text.cached_tokens is None else text.cached_tokens
            text.cached_tokens = min(text.held, before)
        self.counts["cached_tokens"] += text.held
        last = (len(text.tokens) - 1) // size * size
        parting = min(self.prefixes.parting(text.digests), last) if reuse else 0
        text.borders = sorted({parting, last} if self._reuse else ())
        self._rows.begin(text)
        return True

    def _pages_for(self, text: Text, prefix: Prefix | None) -> list[int] | None:
        """Return pages for a text and its next token; None if there are too few.

        Those of the prefix are held, its last one too, which `_restore` copies if it is not full.
        """
        pages = () if prefix is None else prefix.pages
        shared = () if prefix is None else pages[: prefix.num_tokens // self._sizes.page_size]
        wanted = min(len(text.tokens) + 1, self._sizes.max_len)
        needed = self._page_count(wanted) - len(shared)
        self.pool.hold(pages)
        if not self.prefixes.make_room(needed + len(self.running)):
            self.pool.release(pages)
            return None
        return [*shared, *self.pool.take(needed)]

    def _restore(self, text: Text, prefix: Prefix) -> None:
        """Begin a text with a prefix, whose pages are held for it."""
        assert text.row is not None
        self._device.copy_row(prefix.row, text.row)
        if prefix.tail:  # its page goes on otherwise
            self._device.copy_page(prefix.pages[-1], text.pages[len(prefix.pages) - 1])
            self.pool.release(prefix.pages[-1:])
        text.held = prefix.num_tokens

    def _keep(self, text: Text) -> None:
        """Keep a text up to what is held, as a prefix."""
        tokens, size = text.tokens[: text.held], self._sizes.page_size
        if not self._reuse or text.row is None or not tokens:
            return
        if len(text.digests) < len(tokens) // size:
            text.digests = digests_of(tokens, size)
        if self.prefixes.has(tokens, text.digests):
            return
        row = self.prefixes.add(tokens, text.digests, text.pages)
        if row is not None:
            self._device.copy_row(text.row, row)

    # Writing

    def _write(self) -> bool:
        """Write a token of every running text."""
        for text in list(self.running.values()):
            if text.row is not None:  # not preempted by an older one
                self._make_room(text)
        if not self.running:
            return False
        self._close_gaps()
        rows = next(b for b in self._sizes.buckets if b > max(self.running))
        tokens, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        active = np.zeros(rows, bool)
        for row, text in self.running.items():
            tokens[row], lengths[row], active[row] = text.tokens[-1], text.held, True
        logits = self._device.decode(tokens, lengths, active, self._rows.table[:rows])
        for text in self.running.values():
            text.held += 1
        sampled = self._rows.sample(logits, slice(0, rows), active, self.running)
        for row, text in list(self.running.items()):
            self._wrote(text, sampled, row)
        return True

    def _make_room(self, text: Text) -> None:
        """Give a running text the page that its next token needs, if need be one of another's."""
        while self._page_count(text.held + 1) > len(text.pages):
            if not self.prefixes.make_room(1):
                youngest = self.reading or next(reversed(self.running.values()))
                self._preempt(youngest)
                if youngest is text:
                    return
                continue
            [page] = self.pool.take(1)
            self._rows.add_page(text, page)

    def _preempt(self, text: Text) -> None:
        """Let a text wait again; what it has written will be read like its prompt."""
        self._leave(text)
        text.digests, text.held = [], 0
        self.waiting.appendleft(text)
        self.counts["preempted"] += 1

    def _wrote(self, text: Text, sampled: Sampled, at: int) -> None:
        """Append the token drawn at a place to a text; it leaves if it ends with it."""
        if not sampled.finite[at]:
            self._spoiled(text)
            return
        token, logprob = int(sampled.tokens[at]), None
        if text.request.logprobs is not None:
            ranked = zip(sampled.top_tokens[at].tolist(), sampled.top[at].tolist(), strict=True)
            logprob = TokenLogprob(
                token=token,
                logprob=float(sampled.logprobs[at]),
                top=tuple(ranked)[: text.request.logprobs],
            )
        self.counts["new_tokens"] += 1
        try:
            text.write(token, logprob)
        except Exception as error:  # of its grammar; no other request is to suffer from it
            text.end("error", _one_line(error))
        if text.finish_reason is not None:
            self._finish(text)

    # Rows

    def _close_gaps(self) -> None:
        """Move the last running text to a free row before it, where fewer rows then do."""
        buckets, last = self._sizes.buckets, max(self.running)
        taken = set(self.running) | ({self.reading.row} if self.reading else set())
        free = next((row for row in range(last) if row not in taken), None)
        needed = next(b for b in buckets if b >= len(self.running))
        if free is None or next(b for b in buckets if b > last) == needed:
            return
        self._rows.move(self.running[last], free)
        self.running = {t.row: t for t in self.running.values() if t.row is not None}

    def _finish(self, text: Text) -> None:
        """Let a text go that has ended; what it read and wrote is kept as a prefix."""
        self.counts["finished"] += 1
        if text.row is not None:
            self._keep(text)
            self._leave(text)

    def _spoiled(self, text: Text) -> None:
        """End a text whose numbers overflowed, and leave none of them to those that come later.

        Masked tokens are multiplied by 0, which makes nothing of any number but of NaN.
        """
        assert text.row is not None
        own = [page for page in text.pages if self.pool.holders[page] == 1]
        self._device.clear_text(own, text.row)
        self.counts["finished"] += 1
        self._leave(text)
        text.end("error", _OVERFLOW)

    def _leave(self, text: Text) -> None:
        """Free what a text holds."""
        assert text.row is not None
        self.pool.release(text.pages)
        if self.reading is text:
            self.reading = None
        self.running.pop(text.row, None)
        text.pages, text.row = [], None

    def _page_count(self, tokens: int) -> int:
        return -(-tokens // self._sizes.page_size)

    def _width(self, length: int) -> int:
        widths: Iterator[int] = (w for w in _WIDTHS if w >= length)
        return min(next(widths, self._sizes.prefill_chunk), self._sizes.prefill_chunk)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _add_prompt_scores(text: Text, start: int, scores: PromptScores) -> None:
    """Add the scores of the tokens after `start` to a text."""
    if not start:
        text.prompt_logprobs = [None]
    count = text.request.prompt_logprobs
    followers = text.tokens[start + 1 :]
    for token, logprob, top, which in zip(followers, *scores, strict=False):
        ranked = tuple(zip(which.tolist(), top.tolist(), strict=True))[:count]
        text.prompt_logprobs.append(TokenLogprob(token=token, logprob=float(logprob), top=ranked))
