"""Flags of lm-evaluation-harness tasks that the command and `lm_eval --model duo_jax` share."""

import dataclasses
from typing import Literal

from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError

Side = Literal["left", "middle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalFlags(ModelFlags):
    """Which model answers, and how its contexts are read."""

    decode_last: int = 50
    """Tokens at the end of every context that are decoded one by one, so that they, and all that
    follows, see what a streaming head keeps while a model writes. DuoAttention's LongBench runs
    took 50. The tokens before them are read in chunks."""
    truncate: Side = "left"
    """Where a context that is too long is cut. middle: its beginning and its end stay, as LongBench
    does it."""
    max_length: int | None = None
    """Most tokens of a context and what follows it. Default: the model's range."""
    batch_size: int = 1
    """Rows that are decoded together; options of one question share the reading of their context
    as far as they are in one batch."""

    def __post_init__(self) -> None:
        if self.decode_last < 0:
            raise InputError(f"decode_last {self.decode_last} must be at least 0")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length {self.max_length} must be at least 2")
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} must be at least 1")
