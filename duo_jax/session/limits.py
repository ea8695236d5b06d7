"""The limits of a session's rows: tokens a row may have, and slots of the cache it is given."""

import dataclasses
from collections.abc import Sequence

from duo_jax.errors import InputError
from duo_jax.model.config import ModelConfig
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count

# Slots of the smallest cache, over all rows of a batch; a row has 256 at least.
_SMALLEST_CACHE, _SMALLEST_ROW = 1024, 256
_FEW_SIZES = 8192  # up to here sizes are powers of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits set by the model, and by the cache if its size is fixed."""

    architecture: ModelConfig
    max_len: Count | None  # slots of the cache; None: as many as the rows need
    batch_size: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def longest(self) -> int:
        """Tokens that a row may have."""
        model = self.architecture.max_positions
        return model if self.max_len is None else min(model, self.max_len)

    def capacity(self, size: int) -> int:
        """Return how many slots a cache gets that must hold rows of `size` tokens.

        Every size needs programs of its own, which take seconds to compile, so there are few:
        powers of two up to 8,192; beyond, where memory counts, steps of at most an eighth.
        """
        smallest = max(_SMALLEST_ROW, _SMALLEST_CACHE >> (self.batch_size - 1).bit_length())
        if size <= _FEW_SIZES:
            rounded = max(smallest, 1 << (size - 1).bit_length())
        else:
            step = 1 << (size.bit_length() - 4)
            rounded = -(-size // step) * step
        return self.max_len or min(rounded, self.longest)

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse rows that cannot be read.

        Raises:
          InputError: a row is empty or too long, or has a token that is not in the vocabulary.
        """
        if not all(rows):
            raise InputError("the prompt is empty: there is no token to start from")
        vocab_size = self.architecture.vocab_size
        for token in (min(map(min, rows)), max(map(max, rows))):
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"token {token:,} is not one of the model's {vocab_size:,}; do tokenizer and "
                    "model belong together?"
                )
        size = max(map(len, rows))
        if size > self.longest:
            raise InputError(f"{size:,} tokens are too many: {self.reason()}")

    def room(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Return how many tokens each row may still get.

        Raises:
          InputError: as `check`, or a row is full.
        """
        self.check(rows)
        size = max(map(len, rows))
        if size == self.longest:
            raise InputError(f"{size:,} tokens leave no room for new ones: {self.reason()}")
        return [self.longest - len(row) for row in rows]

    def reason(self) -> str:
        """Return what sets the limit, in a few words."""
        if self.longest == self.max_len:
            return f"the cache was made for {self.longest:,}"
        return f"the model's range is {self.longest:,}"
