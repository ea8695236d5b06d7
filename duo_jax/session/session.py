"""Rows of tokens and the cache that holds them: append, let others write on, append again.

The rows' tokens are kept on the host and are the truth; the cache holds a prefix of each row. What
it lacks is read before anything is generated, so that a second question on the same book costs only
its own tokens, and a cache that was lost (an interrupt in the middle of a step) is rebuilt.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax import cache as caches
from duo_jax import serve
from duo_jax.errors import InputError
from duo_jax.session.runtime import Runtime
from duo_jax.session.timing import Timing

Progress = Callable[[int, int], None]  # tokens read, tokens to read

_SMALLEST_CHUNK = 16
_SMALLEST_CACHE = 256

_prefill = jax.jit(
    serve.prefill, static_argnames=("config", "mode", "implementation"), donate_argnames="cache"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a session remembers."""

    tokens: list[list[int]]
    cache: caches.Cache
    logits: jax.Array | None  # [batch, vocab]
    logits_at: list[int]  # tokens of each row before its logits


class Session:
    """A batch of rows that go through one model.

    Args:
      runtime: the model.
      batch_size: number of rows.
      max_len: tokens that a row can hold; default: what is needed, growing as the rows grow.
    """

    def __init__(self, runtime: Runtime, *, batch_size: int = 1, max_len: int | None = None):
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is not at least 1")
        if max_len is not None and max_len < 1:
            raise InputError(f"a cache of {max_len} tokens cannot hold anything")
        self.runtime = runtime
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.timing = Timing()
        self.capacity = 0  # tokens that a row of the cache can hold
        self._max_len = max_len
        self._cache: caches.Cache | None = None
        self._logits: jax.Array | None = None  # [batch, vocab], after _logits_at tokens of each row
        self._logits_at = [0] * batch_size
        self._turn = 0  # counts what was appended and written

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def cache(self) -> caches.Cache | None:
        """The live cache (None while there is none); donated when the session goes on."""
        return self._cache

    def append(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        room: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Append tokens to every row, and read them into the cache.

        Args:
          tokens: one sequence per row; a row may get none.
          room: tokens for which the cache should have room beyond these.
          progress: called after every chunk.

        Raises:
          InputError: a row would be empty, or longer than the model or the cache allows; nothing
            has been appended then.
        """
        if len(tokens) != self.batch_size:
            raise InputError(f"{len(tokens)} rows of tokens for a session of {self.batch_size}")
        rows = [[*old, *map(int, new)] for old, new in zip(self.tokens, tokens, strict=True)]
        self.replace(rows, room=room, progress=progress)

    def replace(
        self, rows: list[list[int]], *, room: int = 0, progress: Progress | None = None
    ) -> None:
        """Make `rows` the session's tokens, reading only what the cache does not hold already.

        Raises:
          InputError: as `append`.
        """
        self._check(rows)
        self._turn += 1
        held = self._held()
        if any(old[:n] != new[:n] for old, new, n in zip(self.tokens, rows, held, strict=True)):
            self._cache = None  # another text, and a ring cannot go back
        self.tokens = rows
        self._reserve(max(map(len, rows)) + room)
        self._read(progress)

    def room(self) -> list[int]:
        """Return how many tokens each row may still get.

        Raises:
          InputError: a row is empty, or there is none for one of them.
        """
        self._check(self.tokens)
        room = [self._limit - len(row) for row in self.tokens]
        if min(room) < 1:
            longest = max(map(len, self.tokens))
            raise InputError(
                f"{longest:,} tokens leave no room for new ones: {self._limit_words()}"
            )
        return room

    def begin_turn(self) -> int:
        """Say that somebody writes on now; return the number to be given to `check_turn`."""
        self._turn += 1
        return self._turn

    def check_turn(self, turn: int) -> None:
        """Refuse to go on for somebody whose turn is over.

        Raises:
          InputError: the session has been appended to or written on since.
        """
        if turn != self._turn:
            raise InputError("the text went on meanwhile: this stream cannot be continued")

    def ready(self, *, room: int) -> jax.Array:
        """Read what is unread, with room for more tokens; return the logits after every row."""
        self._reserve(max(map(len, self.tokens)) + room)
        self._read(None)
        return self._logits

    def take(self) -> caches.Cache:
        """Hand out the cache to be donated.

        Until one is given back the session has none, and would read all its tokens again.
        """
        cache, self._cache = self._cache, None
        return cache

    def give_back(self, cache: caches.Cache, new_tokens: Sequence[Sequence[int]]) -> None:
        """Take back a cache, and the tokens that were decoded with it meanwhile."""
        self._cache = cache
        for row, tokens in zip(self.tokens, new_tokens, strict=True):
            row.extend(tokens)
        self.timing.decode_tokens += sum(map(len, new_tokens))

    def snapshot(self) -> Snapshot:
        """Return what the session remembers; its cache is valid until the session goes on.

        Raises:
          InputError: nothing has been read.
        """
        if self._cache is None:
            raise InputError("nothing has been read yet: there is no cache to save")
        return Snapshot(
            tokens=self.tokens, cache=self._cache, logits=self._logits, logits_at=self._logits_at
        )

    def prepare(self, rows: list[list[int]]) -> caches.Cache:
        """Return an empty cache with room for these rows, to be filled and given to `restore`.

        Raises:
          InputError: they are empty, or longer than the model or the cache allows.
        """
        self._check(rows)
        self._cache = None
        self._reserve(max(map(len, rows)))
        return self.take()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot whose cache came from `prepare`."""
        self.tokens, self._cache = snapshot.tokens, snapshot.cache
        self._logits, self._logits_at = snapshot.logits, snapshot.logits_at

    @property
    def _limit(self) -> int:
        """Return how many tokens a row may have."""
        longest = self.runtime.config.architecture.max_positions
        return longest if self._max_len is None else min(longest, self._max_len)

    def _limit_words(self) -> str:
        if self._limit == self._max_len:
            return f"the cache was made for {self._limit:,}"
        return f"the model's range is {self._limit:,}"

    def _check(self, rows: list[list[int]]) -> None:
        """Refuse rows that cannot be read."""
        vocab_size = self.runtime.config.architecture.vocab_size
        if not all(rows):
            raise InputError("the prompt is empty: there is no token to start from")
        for token in (min(map(min, rows)), max(map(max, rows))):
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"token {token:,} is not one of the model's {vocab_size:,}; do tokenizer and "
                    "model belong together?"
                )
        longest = max(map(len, rows))
        if longest > self._limit:
            raise InputError(f"{longest:,} tokens are too many: {self._limit_words()}")

    def _held(self) -> list[int]:
        """Return how many tokens of each row are in the cache."""
        if self._cache is None:
            return [0] * self.batch_size
        return np.asarray(self._cache.lengths).tolist()

    def _reserve(self, size: int) -> None:
        """Give every row room for `size` tokens."""
        wanted = self._max_len or min(_bucket(size), self._limit)
        if self._cache is None:
            self.capacity = wanted
            self._cache = caches.init_cache(
                self.runtime.config,
                batch_size=self.batch_size,
                max_len=wanted,
                dtype=self.runtime.dtype,
                kv=self.runtime.kv_format,
            )
        elif wanted > self.capacity:
            self.capacity = wanted
            self._cache = caches.grow(self._cache, max_len=wanted)

    def _read(self, progress: Progress | None) -> None:
        """Bring the cache and the logits up to the end of every row."""
        if any(
            held == len(row) != known
            for held, row, known in zip(self._held(), self.tokens, self._logits_at, strict=True)
        ):  # a row's end is in the cache, but what follows it has been forgotten: read again
            self._cache = None
            self._reserve(max(map(len, self.tokens)))
        done, total = 0, sum(map(len, self.tokens)) - sum(self._held())
        while done < total:
            with self.timing.prefill():
                read = self._read_chunk()
            self._logits_at = self._held()
            self.timing.prefill_tokens += read
            done += read
            if progress is not None:
                progress(done, total)  # may raise: everything is in order by now

    def _read_chunk(self) -> int:
        """Read one chunk of every row that is not at its end; return how many tokens."""
        chunk = self.runtime.prefill_chunk
        parts = [row[n : n + chunk] for row, n in zip(self.tokens, self._held(), strict=True)]
        longest = max(map(len, parts))
        # Widths are powers of two, so that few programs serve all lengths.
        width = min(chunk, max(_SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
        width = 1 if longest == 1 else width
        num_tokens = np.array([len(part) for part in parts], np.int32)
        padded = np.array([part + [0] * (width - len(part)) for part in parts], np.int32)
        logits, cache = _prefill(
            self.runtime.config,
            self.runtime.params,
            self.take(),
            jnp.asarray(padded),
            jnp.asarray(num_tokens),
            mode=self.runtime.prefill_mode,
            implementation=self.runtime.implementation,
            total_lengths=jnp.array([len(row) for row in self.tokens], jnp.int32),
        )
        if self._logits is not None:
            logits = jnp.where(jnp.asarray(num_tokens > 0)[:, None], logits, self._logits)
        self._logits, self._cache = logits.block_until_ready(), cache
        return int(num_tokens.sum())


def _bucket(size: int) -> int:
    """Round up so that few cache sizes need a program of their own; wastes at most an eighth."""
    step = max(_SMALLEST_CACHE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
