"""Flags that our command and `lm_eval --model duo_jax` share."""

import dataclasses
from typing import Literal

from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError

Side = Literal["left", "middle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalFlags(ModelFlags):
    """The model that answers, and how it reads contexts."""

    decode_last: int = 50
    """Tokens at the end of every context that are decoded one by one, so that they, and all tokens
    after them, see only what a streaming head keeps during generation. DuoAttention's LongBench
    runs used 50. Earlier tokens are read in chunks."""
    truncate: Side = "left"
    """Where a context that is too long is cut. middle: its beginning and its end are kept, as in
    LongBench."""
    max_length: int | None = None
    """Most tokens of a context and its continuation together. Default: the model's range."""
    batch_size: int = 1
    """Rows that are decoded together. The options of a question share the reading of their context
    where they are in one batch."""

    def __post_init__(self) -> None:
        if self.decode_last < 0:
            raise InputError(f"decode_last {self.decode_last} must be at least 0")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length {self.max_length} must be at least 2")
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} must be at least 1")
