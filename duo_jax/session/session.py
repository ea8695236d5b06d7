"""A session: rows of tokens that are read, continued and appended to, and their cache.

The tokens are kept on the host and are authoritative; the cache holds a prefix of each row. What it
lacks is read before anything is decoded, so a second question about the same book costs only its
own tokens, and a cache that was lost (an interrupt in the middle of a step) is rebuilt.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duo_jax.cache import Cache
from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count, Size
from duo_jax.serve import decoding
from duo_jax.serve.sampling import SamplingConfig, check_seed, seen_tokens
from duo_jax.session.eviction import evict
from duo_jax.session.limits import Limits
from duo_jax.session.row_cache import Progress, RowCache
from duo_jax.session.runtime import Runtime
from duo_jax.session.timing import Timing

SEGMENT = 64  # tokens decoded before the host looks: for Ctrl-C, and for rows that it ends
_SHORT = 8  # tokens between two yields where time cannot tell
_SEGMENT_SECONDS = 0.05  # how far a streamed text may lag behind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a session remembers."""

    tokens: list[list[int]]
    cache: Cache
    logits: Float[Array, "batch vocab"]
    logits_at: list[int]  # tokens of each row before its logits


@dataclasses.dataclass(kw_only=True)
class Loan:
    """A session's cache, lent out; what the loan holds in the end goes back to the session."""

    cache: Cache | None  # None: used up; the session would read its tokens again
    logits: Float[Array, "batch vocab"]  # after every row
    tokens: Sequence[Sequence[int]]  # to be set to the tokens decoded with the cache, per row

    def take(self) -> Cache:
        """Return the cache, to be donated; assign to `cache` what comes back."""
        cache, self.cache = self.cache, None
        assert cache is not None
        return cache


class Session:
    """A batch of rows that go through one model.

    Args:
      runtime: the model.
      batch_size: number of rows.
      max_len: tokens that a row can hold; default: as many as are needed, growing with the rows.
    """

    def __init__(self, runtime: Runtime, *, batch_size: int = 1, max_len: int | None = None):
        batch_size = argument("batch_size", batch_size, Count)
        self.runtime = runtime
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.timing = Timing()
        self._limits = Limits(
            architecture=runtime.config.architecture, max_len=max_len, batch_size=batch_size
        )
        self._row_cache = RowCache(runtime, batch_size, self._limits, self.timing)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def cache(self) -> Cache | None:
        """The live cache (None while there is none); donated when the session goes on."""
        return self._row_cache.cache

    @property
    def capacity(self) -> int:
        """Tokens that a row of the cache can hold."""
        return self._row_cache.slots + self._row_cache.evicted

    def no_room(self) -> str | None:
        """Return why no token can follow the longest row; None: one can."""
        full = max(map(len, self.tokens)) >= self._limits.longest
        return self._limits.reason() if full else None

    @property
    def whole_slots(self) -> int:
        """Slots of a full cache that held all tokens, as one from which none are evicted does."""
        if self.runtime.keep == 1:
            return self._row_cache.slots
        return self._row_cache.slots_for(max(map(len, self.tokens)))

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
          progress: called after every chunk, with tokens read and tokens to read.

        Raises:
          InputError: a row would be empty, or longer than the model, the cache or the memory
            allows; nothing has been appended then.
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
        room = argument("room", room, Size)
        if progress is not None and not callable(progress):
            raise InputError(f"progress {quoted(progress)} is no function")
        self._limits.check(rows)
        held = self._row_cache.held
        both = zip(self.tokens, rows, held, strict=True)
        kept = [_shared(old[:end], new) for old, new, end in both]
        if kept != held:  # another text; the logits of its last token are needed
            ends = zip(kept, rows, strict=True)
            self._row_cache.go_back([min(length, len(row) - 1) for length, row in ends])
        self._row_cache.reserve(max(map(len, rows)) + room)
        self.tokens = rows
        self._row_cache.read(rows, room=room, progress=progress)

    def decode(
        self,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        segment: int | None = SEGMENT,
        ended: Collection[int] = (),
    ) -> Iterator[list[list[int]]]:
        """Continue every row; yield the new tokens of every row, some at a time.

        What was yielded belongs to the session. A row ends after `max_new_tokens`, where the
        model's range or the cache's size ends, with a stop token (which is yielded), or when the
        caller adds its number to `ended`.

        Args:
          max_new_tokens: maximum number of new tokens per row.
          sampling: how tokens are drawn; default: greedy.
          stop_tokens: tokens that end a row.
          seed: random seed.
          segment: maximum number of tokens per row between two yields; None: as many as take about
            50 ms.
          ended: rows that the caller ends, between two yields.

        Raises:
          InputError: there is nothing to continue, no room for a single new token, or the session
            was used otherwise between two yields.
        """
        max_new_tokens = argument("max_new_tokens", max_new_tokens, Count)
        check_seed(seed)
        most = np.minimum(max_new_tokens, self._limits.room(self.tokens))
        options = (sampling or SamplingConfig()).options()
        stops = jnp.array(tuple(stop_tokens), jnp.int32)
        with self.borrowed(room=max_new_tokens) as loan, self.timing.decode():
            vocab_size = self.runtime.config.architecture.vocab_size
            penalty = "repetition_penalty" in options
            state = decoding.begin(
                loan.take(),
                loan.logits,
                decoding.row_rng_keys(seed, self.batch_size),
                seen_tokens(self.tokens, vocab_size) if penalty else None,
                options,
                stops,
            )
            new = [[token] for token in np.asarray(state.last).tolist()]
            loan.cache, loan.tokens = state.cache, new
        counts = np.ones(self.batch_size, int)
        # Several processes must do the same, whatever their clocks say.
        segment = _SHORT if segment is None and jax.process_count() > 1 else segment
        size = min(segment or 1, SEGMENT)
        while True:
            yield new
            if self.cache is not state.cache:
                raise InputError("the text went on meanwhile: this stream cannot be continued")
            stopped = np.array(state.stopped)
            stopped[list(ended)] = True
            limits = np.where(stopped, 0, np.minimum(most - counts, size))
            if not limits.any():
                return
            before = self.timing.decode_seconds
            with self._lent() as loan, self.timing.decode():
                loan.take()  # donated with the state
                state, tokens, num = decoding.decode_segment(
                    self.runtime.config,
                    self.runtime.params,
                    dataclasses.replace(state, stopped=jnp.asarray(stopped)),
                    options,
                    stops,
                    jnp.asarray(limits, jnp.int32),
                    size=SEGMENT,
                    implementation=self.runtime.implementation,
                )
                num = np.asarray(num)
                new = [row[:n].tolist() for row, n in zip(np.asarray(tokens), num, strict=True)]
                loan.cache, loan.tokens = state.cache, new
            counts += num
            if segment is None:
                seconds = (self.timing.decode_seconds - before) / num.max()
                size = int(np.clip(_SEGMENT_SECONDS / max(seconds, 1e-6), 1, SEGMENT))

    @contextlib.contextmanager
    def borrowed(self, *, room: int = 0) -> Iterator[Loan]:
        """Read what is unread, and lend the cache to code that donates it.

            with session.borrowed(room=1) as loan:
                logits, loan.cache = decode(config, params, loan.take(), tokens)
                loan.tokens = tokens[:, None].tolist()

        If the block fails the cache is lost, and is read again when it is needed.

        Args:
          room: tokens for which the cache should have room beyond the rows.

        Raises:
          InputError: a row is empty, or tokens cannot be evicted (duo_jax.session.eviction).
        """
        self._limits.check(self.tokens)
        self._row_cache.read(self.tokens, room=room)
        with self.timing.prefill():
            evict(self._row_cache, self.runtime, self.tokens, room=room)
        with self._lent() as loan:
            yield loan

    def snapshot(self) -> Snapshot:
        """Return what the session remembers; its cache is valid until the session goes on.

        Raises:
          InputError: nothing has been read.
        """
        cache, logits = self._row_cache.cache, self._row_cache.logits
        if cache is None or logits is None:
            raise InputError("nothing has been read yet: there is no cache to save")
        return Snapshot(
            tokens=self.tokens, cache=cache, logits=logits, logits_at=self._row_cache.logits_at
        )

    def empty_cache(self, rows: list[list[int]], *, kept: int) -> Cache:
        """Return a cache for these rows, to be filled and given to `restore`.

        Args:
          rows: the tokens.
          kept: how many of a row's tokens full caches hold at most.

        Raises:
          InputError: a row is empty, or longer than the model or the cache allows.
        """
        self._limits.check(rows)
        return self._row_cache.empty(kept)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot whose cache came from `empty_cache`."""
        self.tokens, held = snapshot.tokens, self._row_cache
        held.cache, held.logits = snapshot.cache, snapshot.logits
        held.logits_at = snapshot.logits_at
        held.slots = held.slots_for(int(snapshot.cache.kept.max()))

    @contextlib.contextmanager
    def _lent(self) -> Iterator[Loan]:
        """Lend the cache as it is; the session has none until the block has succeeded."""
        held = self._row_cache
        assert held.logits is not None
        loan = Loan(cache=held.cache, logits=held.logits, tokens=[()] * self.batch_size)
        held.cache = None
        yield loan
        held.cache = loan.cache
        for row, tokens in zip(self.tokens, loan.tokens, strict=True):
            row.extend(tokens)
            self.timing.decode_tokens += len(tokens)


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two rows begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
