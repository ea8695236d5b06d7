"""The cache of a session: it holds a prefix of every row, and reads what it lacks in chunks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duo_jax import cache as caches
from duo_jax import serve
from duo_jax.cache import Cache
from duo_jax.session import memory
from duo_jax.session.limits import Limits
from duo_jax.session.runtime import Runtime
from duo_jax.session.timing import Timing

Progress = Callable[[int, int], None]  # tokens read, tokens to read
Rows = Sequence[Sequence[int]]

# Widths of a chunk that is not full. Every width needs a program of its own, which takes seconds to
# compile; padding costs a short text less than that, and a longer one is read in pieces.
_WIDTHS = (64, 256, 1024)

_BLOCK = 64  # slots

_prefill = jax.jit(
    serve.prefill,
    static_argnames=("config", "mode", "voters", "implementation"),
    donate_argnames="cache",
)


class RowCache:
    """The cache of a batch of rows, and the logits after some of their tokens.

    Args:
      runtime: the model.
      batch_size: number of rows.
      limits: what the rows may grow to.
      timing: where reading is counted.
    """

    def __init__(self, runtime: Runtime, batch_size: int, limits: Limits, timing: Timing) -> None:
        self.cache: Cache | None = None  # None before anything is read, and while it is lent
        self.slots = 0  # of its full caches
        self.logits: Float[Array, "batch vocab"] | None = None  # after logits_at tokens of each row
        self.logits_at = [0] * batch_size
        self._runtime, self._batch_size = runtime, batch_size
        self._limits, self._timing = limits, timing

    @property
    def held(self) -> list[int]:
        """Tokens of each row that are in the cache."""
        if self.cache is None:
            return [0] * self._batch_size
        return np.asarray(self.cache.lengths).tolist()

    @property
    def evicted(self) -> int:
        """Tokens that every row's full caches hold no more."""
        if self.cache is None or self._runtime.keep == 1:
            return 0
        return int(np.min(np.asarray(self.cache.lengths) - np.asarray(self.cache.kept)))

    def take(self) -> Cache:
        """Return the cache, to be used up; what becomes of it belongs in `cache`."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache

    def empty(self, size: int) -> Cache:
        """Return an empty cache with room for `size` tokens in every row.

        Raises:
          InputError: there is too little memory for it.
        """
        config, sizes = self._runtime.config, self._sizes(size)
        with memory.for_cache(caches.device_bytes(config, **sizes)):
            return jax.block_until_ready(caches.init_cache(config, **sizes))

    def go_back(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of every row; all are forgotten where the cache cannot go back.

        A streaming head's ring cannot once it has gone round: what it held is overwritten. Nor can
        int2, whose blocks of tokens are quantised together, or a cache that has evicted tokens.
        """
        held, config = self.held, self._runtime.config
        window = config.sink_size + config.recent_size
        streaming = min(config.retrieval_counts) < config.architecture.num_kv_heads
        if (
            self.cache is None
            or self._runtime.kv_format == "int2"
            or bool((self.cache.kept != self.cache.lengths).any())  # of any row
            or (streaming and max(held) > window)
        ):
            self.cache = None
            return
        self.cache = caches.with_lengths(self.cache, jnp.array(lengths, jnp.int32))
        pairs = zip(self.logits_at, lengths, strict=True)
        self.logits_at = [at if at <= length else 0 for at, length in pairs]

    def read(
        self, rows: Rows, *, room: int = 0, progress: Progress | None = None
    ) -> Float[Array, "batch vocab"]:
        """Bring the cache to the end of every row, and return the logits there.

        Args:
          rows: begin with what the cache holds.
          room: tokens for which the cache should have room beyond the rows.
          progress: called after every chunk.

        Raises:
          InputError: there is too little memory.
        """
        size = max(map(len, rows)) + room
        ends = zip(self.held, rows, self.logits_at, strict=True)
        if any(held == len(row) != known for held, row, known in ends):
            self.cache = None  # an end is held, but its logits are forgotten: read again
        self.reserve(size)
        done, total = 0, sum(map(len, rows)) - sum(self.held)
        while done < total:
            with self._timing.prefill():
                read = self._read_chunk(rows, more=done > 0)
            self.logits_at = self.held
            self._timing.prefill_tokens += read
            done += read
            if progress is not None:
                progress(done, total)  # may raise: everything is in order by now
        assert self.logits is not None
        return self.logits

    def reserve(self, size: int) -> None:
        """Give every row room for `size` tokens.

        Raises:
          InputError: there is too little memory; what was held still is.
        """
        size -= self.evicted
        slots = self.slots_for(size)
        if self.cache is None:
            self.cache, self.slots = self.empty(size), slots
        elif slots > self.slots:
            with memory.for_cache(caches.device_bytes(self._runtime.config, **self._sizes(size))):
                larger = caches.grow(self.cache, max_len=slots)
                self.cache, self.slots = jax.block_until_ready(larger), slots

    def slots_for(self, size: int) -> int:
        """Return how many slots full caches get for `size` tokens.

        Where tokens are evicted, `max_len` bounds the tokens of a row, and its caches take what
        they need, in blocks: of a fixed size they would not become smaller.
        """
        if self._runtime.keep < 1 and self._limits.max_len is not None:
            return whole_blocks(size)
        return self._limits.capacity(size)

    def _sizes(self, size: int) -> dict[str, Any]:
        """Return the arguments of a cache for rows of `size` tokens."""
        return {
            "batch_size": self._batch_size,
            "max_len": self.slots_for(size),
            "dtype": self._runtime.dtype,
            "kv": self._runtime.kv_format,
            "votes": self._runtime.keep < 1,
            "mesh": self._runtime.mesh,
        }

    def _read_chunk(self, rows: Rows, *, more: bool) -> int:
        """Read one chunk of every row that is not at its end; return how many tokens.

        `more` says that it goes on with what the chunk before it has begun.
        """
        held = self.held
        unread = max(len(row) - n for row, n in zip(rows, held, strict=True))
        chunk, mode = self._runtime.prefill_chunk, self._runtime.prefill_mode
        width = chunk_width(unread, chunk, mode, more=more)
        if self._runtime.keep < 1:
            width = max(width, min(_WIDTHS[0], chunk))  # a single token would not vote
        parts = [row[n : n + width] for row, n in zip(rows, held, strict=True)]
        logits = self.prefill(parts, width=width, total_lengths=list(map(len, rows)))
        if self.logits is not None:
            logits = jnp.where(jnp.array([[len(part) > 0] for part in parts]), logits, self.logits)
        self.logits = logits.block_until_ready()
        return sum(map(len, parts))

    def prefill(
        self,
        parts: Rows,
        *,
        width: int,
        total_lengths: Sequence[int],
        voters: serve.Voters = "latest",
    ) -> Float[Array, "batch vocab"]:
        """Append some tokens to every row of the cache, and return the logits after them.

        Args:
          parts: the tokens, at most `width` for each row.
          width: what they are padded to.
          total_lengths: as in duo_jax.serve.prefill.
          voters: as there.
        """
        padded = np.array([[*part, *([0] * (width - len(part)))] for part in parts], np.int32)
        logits, self.cache = _prefill(
            self._runtime.config,
            self._runtime.params,
            self.take(),
            jnp.asarray(padded),
            jnp.array([len(part) for part in parts], jnp.int32),
            mode=self._runtime.prefill_mode,
            implementation=self._runtime.implementation,
            total_lengths=jnp.array(total_lengths, jnp.int32),
            voters=voters,
        )
        return logits


def whole_blocks(size: int) -> int:
    """Return the slots of a cache that evicts and is given a fixed size, for `size` tokens."""
    return -(-size // _BLOCK) * _BLOCK


def chunk_width(unread: int, chunk: int, mode: str, *, more: bool) -> int:
    """Return how many tokens per row are read next, padding included.

    Args:
      unread: tokens that the longest row lacks.
      chunk: tokens that may be read at a time.
      mode: a PrefillMode; with "chunk" the result depends on how a text is cut, so that a chunk
        stays in one piece.
      more: whether a chunk was read just before; then its program serves the rest too.
    """
    if unread >= chunk:
        return chunk
    if unread == 1 and not more:
        return 1
    widths = _WIDTHS[-1:] if more else _WIDTHS
    width = next((width for width in widths if width >= unread), _WIDTHS[-1])
    if mode == "chunk":
        width = max(width, 1 << (unread - 1).bit_length())
    return min(width, chunk)
