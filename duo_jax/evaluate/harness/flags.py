"""Flags that our command and `lm_eval --model duo_jax` share."""

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from duo_jax.cli.model_flags import ModelFlags
from duo_jax.schema.kinds import LARGEST_INT32, Count, Size

Side = Literal["left", "middle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalFlags(ModelFlags):
    """The model that answers, and how it reads contexts."""

    decode_last: Size = 50
    """Tokens at the end of every context that are decoded one by one, so that they, and all tokens
    after them, see only what a streaming head keeps during generation. DuoAttention's LongBench
    runs used 50. Earlier tokens are read in chunks."""
    truncate: Side = "left"
    """Where a context that is too long is cut. middle: its beginning and its end are kept, as in
    LongBench."""
    max_length: Annotated[int, Meta(ge=2, le=LARGEST_INT32)] | None = None
    """Maximum number of tokens of a context and its continuation together. Default: the model's
    range."""
    batch_size: Count = 1
    """Rows that are decoded together. The options of a question share the reading of their context
    where they are in one batch."""
