"""Which part of a case the XLA version computes, where all of it would take minutes."""

import dataclasses
from typing import Any

from kernels.case import Case
from kernels.prefill.cases import PrefillCase

_MOST_PAIRS = 2**30  # of queries and keys, of one head; XLA's loop takes seconds for them
_QUERIES = 256  # of a piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a case that is a case by itself."""

    name: str
    case: Case
    first: int | None = None  # query tokens first .. end - 1; None: all
    end: int | None = None

    @property
    def rows(self) -> Any:
        """Index of the piece's part of the outputs."""
        return slice(None) if self.first is None else (slice(None), slice(self.first, self.end))

    def arguments(self, *whole: Any) -> tuple[Any, ...]:
        """Return the piece's arguments, given those of the case."""
        if self.first is None:
            return whole
        q, k, v, offsets = whole
        return q[:, self.first : self.end], k, v, offsets + self.first


def pieces(case: Case) -> list[Piece]:
    """Return what to compare: all of a case, or the first, middle and last queries of a prefill."""
    if not isinstance(case, PrefillCase) or case.length <= 3 * _QUERIES:
        return [Piece(name="all", case=case)]
    if case.length * max(offset + case.length for offset in case.offsets) <= _MOST_PAIRS:
        return [Piece(name="all", case=case)]
    middle = (case.length - _QUERIES) // 2 + 1  # not at the edge of a tile
    return [
        Piece(
            name=f"queries {first} to {first + _QUERIES - 1}",
            case=dataclasses.replace(
                case, length=_QUERIES, offsets=tuple(offset + first for offset in case.offsets)
            ),
            first=first,
            end=first + _QUERIES,
        )
        for first in (0, middle, case.length - _QUERIES)
    ]
