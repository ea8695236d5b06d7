"""The kinds of numbers and texts that files and arguments hold, as annotated types.

    recent: Count | None = None

`duo_jax.schema.check` enforces them; for everybody else they are plain int, float and str.
"""

from typing import Annotated

from msgspec import Meta

LARGEST_INT32 = 2**31 - 1  # positions and sizes are int32 on the device

Count = Annotated[int, Meta(ge=1, le=LARGEST_INT32)]
Size = Annotated[int, Meta(ge=0, le=LARGEST_INT32)]
# What is listed, drawn or held in memory at once: rounds and rows of a batch, and samples.
Few = Annotated[int, Meta(ge=1, le=1_000)]
Many = Annotated[int, Meta(ge=1, le=10_000)]
FewOrNone = Annotated[int, Meta(ge=0, le=1_000)]
ManyOrNone = Annotated[int, Meta(ge=0, le=10_000)]
# The words around what is hidden in a text; each is encoded up to 20 times.
Template = Annotated[str, Meta(max_length=20_000)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Share = Annotated[float, Meta(gt=0.0, le=1.0)]  # of what must not be nothing
# Within float32 on the device, squares included.
Positive = Annotated[float, Meta(gt=0.0, le=1e18)]
NotNegative = Annotated[float, Meta(ge=0.0, le=1e18)]
Nats = NotNegative  # of a token: likelihoods and divergences
