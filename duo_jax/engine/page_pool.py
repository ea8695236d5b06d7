"""Which pages are free, and how many requests and kept prefixes hold each of the others."""

from collections.abc import Iterable

import numpy as np


class PagePool:
    """Numbers of pages; holding and releasing them moves nothing on the device."""

    def __init__(self, num_pages: int) -> None:
        self.holders = np.zeros(num_pages, np.int64)
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest number is taken first

    @property
    def num_pages(self) -> int:
        return len(self.holders)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return free pages, now held once; there must be as many."""
        assert 0 <= count <= len(self._free)
        pages = [self._free.pop() for _ in range(count)]
        self.holders[pages] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages once more."""
        for page in pages:
            assert self.holders[page] > 0
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold pages once less; those that nobody holds are free."""
        for page in pages:
            assert self.holders[page] > 0
            self.holders[page] -= 1
            if not self.holders[page]:
                self._free.append(page)
