"""Which tokens a session's retrieval heads keep: once a text is read, before anything is written.

With `Runtime.keep` below 1, every retrieval head keeps that fraction of the tokens that were read,
by one of two votes (duo_jax.serve.votes):

    "snapkv"  of the text's last 32 tokens. Costs nothing beside reading, and serves a question at
              the end of the text; later questions find what the first one left.
    "kvzip"   of the whole text, which the model is made to repeat piece by piece; the repetition is
              forgotten again. Costs about as much as reading the text a second time, and serves any
              question.

When more has been read the same is done again: what was evicted does not come back, and what was
written meanwhile may go.
"""

import numpy as np

from duo_jax import cache as caches
from duo_jax.errors import InputError
from duo_jax.session.row_cache import RowCache, Rows
from duo_jax.session.runtime import Runtime

_PIECE = 1024  # tokens that the model repeats at a time, the request to do so included
_LEAST = 64  # fewer are not worth a program


def evict(held: RowCache, runtime: Runtime, rows: Rows, *, room: int) -> None:
    """Evict what `runtime.keep` asks for from a cache that holds all of its rows.

    Args:
      held: the cache.
      runtime: the model.
      rows: the tokens that the cache holds.
      room: tokens for which the cache should have room beyond those that stay.

    Raises:
      InputError: the model's range leaves no room to repeat the text, or memory is short.
    """
    if runtime.keep == 1 or held.cache is None:
        return
    lengths, kept = (np.asarray(x) for x in (held.cache.lengths, held.cache.kept))
    wanted = np.maximum(caches.LATEST, np.ceil(runtime.keep * lengths)).astype(int)
    if (wanted >= kept).all():
        return
    if runtime.keep_by == "kvzip":
        _repeat(held, runtime, rows)
    keep = np.minimum(wanted, kept)
    slots = min(held.slots, held.slots_for(int(keep.max()) + room))
    held.cache, held.slots = caches.evict(held.take(), keep.tolist(), slots=slots), slots


def _repeat(held: RowCache, runtime: Runtime, rows: Rows) -> None:
    """Count the votes of the text's repetition, and forget that again."""
    longest = max(map(len, rows))
    rest = runtime.config.architecture.max_positions - longest
    width = min(_PIECE, runtime.prefill_chunk, rest)
    instruction = runtime.instruction
    assert instruction is not None
    piece = width - instruction.longest
    if piece < _LEAST:
        raise InputError(
            f'"kvzip" repeats the text in pieces, for which {longest:,} tokens leave too little of '
            f'the model\'s range ({rest:,} tokens) or of prefill_chunk; "snapkv" needs none'
        )
    held.reserve(longest + width)
    held.cache = caches.without_votes(held.take())
    for first in range(0, longest, piece):
        parts = [
            [*instruction.before(row, first), *row[first : first + piece]]
            if first < len(row)
            else []
            for row in rows
        ]
        assert held.cache is not None
        end = caches.mark(held.cache)
        try:
            held.prefill(parts, width=width, total_lengths=list(map(len, rows)), voters="all")
            held.cache = caches.rewind(held.take(), end)
        except BaseException:  # Ctrl-C too: a cache with a part of the repetition is of no use
            held.cache = None
            raise
