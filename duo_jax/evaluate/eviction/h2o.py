"""H2O: heavy hitters and recent tokens.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048, section 4 and algorithm 1. Each head keeps the most recent tokens and,
of the others, those with the highest attention accumulated over all queries so far; half of the
budget each (section 5, the public code's equal heavy and recent ratios). As in the public code the
prompt is read whole and evicted from once; then every step appends a token and evicts one.

GQA: the paper's models have one KV head per query head. Here the scores of a group are averaged.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

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
class H2O:
    """The policy of H2O; the module's docstring describes it."""

    name: ClassVar[str] = "H2O"
    keeps_written: ClassVar[bool] = False
    window: int | None = None
    recent_share: float = 0.5  # of the budget

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Keep the recent and the heaviest tokens."""
        sizes = equal_sizes(prompt, budget)
        is_recent = self._is_recent(
            jnp.arange(prompt.tokens.shape[1])[None], prompt.lengths, sizes[:, 0, 0]
        )
        scores = jnp.where(is_recent[:, None, None], jnp.inf, prompt.received)
        kept = highest(jnp.where(prompt.exists, scores, -jnp.inf), sizes)
        return Selection(kept=kept, sizes=sizes)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the share of a head."""
        return share(prompt, budget)

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Drop the lightest token that is not recent, once the budget is full."""
        del state
        is_recent = self._is_recent(step.held.positions, step.now[:, None] + 1, step.sizes)
        scores = jnp.where(is_recent, jnp.inf, step.held.received)
        return all_but_lowest(scores, step.held, step.sizes)

    def _is_recent(
        self,
        positions: Int[Array, "*#heads slots"],
        lengths: Int[Array, "*#heads"],
        sizes: Int[Array, "*#heads"],
    ) -> Bool[Array, "*#heads slots"]:
        number = jnp.round(sizes.astype(jnp.float32) * self.recent_share).astype(jnp.int32)
        return positions >= (lengths - number)[..., None]
