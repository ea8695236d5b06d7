"""TOVA: drop what the latest query looks at least.

Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.2 and algorithm 1.
When a cache is full, the token with the lowest attention of the latest query goes, whichever it is:
nothing is protected, the newest token included. The attention is averaged over all query heads of a
layer, so that a layer's heads keep the same tokens. The prompt is read whole, and reduced by the
attention of its last query (the public code's TOVACache.reduce).

GQA: as in the public code, the average over a layer's query heads; nothing to choose per group.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import (
    Budget,
    Selection,
    Step,
    all_but_lowest,
    equal_sizes,
    highest,
    share,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA:
    """The policy of TOVA; the module's docstring describes it."""

    name: ClassVar[str] = "TOVA"
    keeps_written: ClassVar[bool] = False
    window: int | None = 1

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Keep what the prompt's last query looks at most."""
        sizes = equal_sizes(prompt, budget)
        scores = jnp.where(prompt.exists, _of_layer(prompt.received), -jnp.inf)
        return Selection(kept=highest(scores, sizes), sizes=sizes)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the share of a head."""
        return share(prompt, budget)

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Drop what the new query looks at least, once the budget is full."""
        del state
        return all_but_lowest(_of_layer(step.attention), step.held, step.sizes)


def _of_layer(attention: Float[Array, "*b kv_heads slots"]) -> Float[Array, "*b kv_heads slots"]:
    """Average over the heads of a layer, and give each of them the result."""
    mean = attention.mean(axis=-2, keepdims=True)
    return jnp.broadcast_to(mean, attention.shape)
