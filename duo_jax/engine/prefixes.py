"""Beginnings of texts whose keys and values are kept, to be shared by later requests.

A prefix is the pages of its tokens, and a snapshot of the rings as they were after the last one:
without the rings a text cannot be read on from there, so only such places can be shared. Full pages
are shared as they are, nobody writes to them again; a last page that is not full is copied.

Snapshots are made where a prompt is left between two chunks, at the last border of a page in a
prompt, where it parts from a text that is known, and where an answer ends. Prefixes that were used
longest ago are forgotten first, when pages or rows for snapshots run out; pinned ones never.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from duo_jax.engine.page_pool import PagePool

Digests = list[bytes]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Tokens that are held."""

    num_tokens: int
    digests: tuple[bytes, ...]  # after every full page
    tail: tuple[int, ...]  # tokens beyond these
    pages: tuple[int, ...]
    row: int  # of the snapshot
    pinned: bool = False


def digests_of(tokens: Sequence[int], page_size: int) -> Digests:
    """Return a digest of all tokens up to the end of each full page."""
    array, digest, found = np.asarray(tokens, np.int32), b"", []
    for end in range(page_size, len(array) + 1, page_size):
        page = array[end - page_size : end].tobytes()
        digest = hashlib.blake2b(digest + page, digest_size=16).digest()
        found.append(digest)
    return found


class Prefixes:
    """The prefixes that are kept.

    Args:
      pool: their pages are held there.
      rows: rows of the rings that may take snapshots.
      page_size: tokens of a page.
    """

    def __init__(self, pool: PagePool, rows: Sequence[int], page_size: int) -> None:
        self._pool, self._free_rows, self._page_size = pool, list(rows), page_size
        self._used: collections.OrderedDict[Prefix, None] = collections.OrderedDict()
        self._by_digest: dict[bytes, list[Prefix]] = {}  # by that of all full pages
        self._known: collections.Counter[bytes] = collections.Counter()  # of any full page
        self._holds = np.zeros(pool.num_pages, np.int64)  # by prefixes that may be forgotten

    def __iter__(self):
        """Yield all prefixes, those used longest ago first."""
        return iter(self._used)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def find(self, tokens: Sequence[int], digests: Digests) -> Prefix | None:
        """Return the longest prefix of a text that leaves at least one token to be read."""
        for full in range(len(digests), -1, -1):
            begun = full * self._page_size
            candidates = [
                prefix
                for prefix in self._by_digest.get(digests[full - 1] if full else b"", [])
                if prefix.num_tokens < len(tokens)
                and list(prefix.tail) == list(tokens[begun : prefix.num_tokens])
            ]
            if candidates:
                found = max(candidates, key=lambda prefix: prefix.num_tokens)
                self._used.move_to_end(found)
                return found
        return None

    def parting(self, digests: Digests) -> int:
        """Return how many tokens of a text, in whole pages, some prefix begins with too."""
        known = (full for full in range(len(digests), 0, -1) if digests[full - 1] in self._known)
        return next(known, 0) * self._page_size

    def has(self, tokens: Sequence[int], digests: Digests, *, pinned: bool = False) -> bool:
        """Whether a text is a prefix already, of those that are pinned if so wished."""
        full = len(tokens) // self._page_size
        tail = tuple(tokens[full * self._page_size :])
        same = self._by_digest.get(digests[full - 1] if full else b"", [])
        return any(prefix.tail == tail and (prefix.pinned or not pinned) for prefix in same)

    def add(
        self,
        tokens: Sequence[int],
        digests: Digests,
        pages: Sequence[int],
        *,
        pinned: bool = False,
    ) -> int | None:
        """Keep a text; return the row for a snapshot of its rings, None if there is none.

        Args:
          tokens: the text.
          digests: of at least its full pages.
          pages: where it lies; held from now on.
          pinned: it is never forgotten.
        """
        if not self._free_rows and not self._forget_one():
            return None
        full = len(tokens) // self._page_size
        prefix = Prefix(
            num_tokens=len(tokens),
            digests=tuple(digests[:full]),
            tail=tuple(tokens[full * self._page_size :]),
            pages=tuple(pages[: -(-len(tokens) // self._page_size)]),
            row=self._free_rows.pop(),
            pinned=pinned,
        )
        self._pool.hold(prefix.pages)
        if not pinned:
            self._holds[list(prefix.pages)] += 1
        self._used[prefix] = None
        self._by_digest.setdefault(self._key(prefix), []).append(prefix)
        self._known.update(prefix.digests)
        return prefix.row

    def make_room(self, pages: int) -> bool:
        """Forget prefixes until so many pages are free; return whether that can be."""
        if self._pool.num_free < pages and self._pool.num_free + self.num_pages < pages:
            return False
        while self._pool.num_free < pages:
            self._forget_one()
        return True

    @property
    def num_pinned_pages(self) -> int:
        """Pages of prefixes that are never forgotten, counted for each of them."""
        return sum(len(prefix.pages) for prefix in self._used if prefix.pinned)

    @property
    def num_pages(self) -> int:
        """Pages that are free once all prefixes are forgotten that may be."""
        return int(np.sum((self._holds > 0) & (self._holds == self._pool.holders)))

    def _forget_one(self) -> bool:
        oldest = next((prefix for prefix in self._used if not prefix.pinned), None)
        if oldest is not None:
            self._forget(oldest)
        return oldest is not None

    def _forget(self, prefix: Prefix) -> None:
        del self._used[prefix]
        same = self._by_digest[self._key(prefix)]
        same.remove(prefix)
        if not same:
            del self._by_digest[self._key(prefix)]
        self._known.subtract(prefix.digests)
        for digest in prefix.digests:
            if not self._known[digest]:
                del self._known[digest]
        self._pool.release(prefix.pages)
        if not prefix.pinned:
            self._holds[list(prefix.pages)] -= 1
        self._free_rows.append(prefix.row)

    @staticmethod
    def _key(prefix: Prefix) -> bytes:
        return prefix.digests[-1] if prefix.digests else b""
