"""SnapKV: what the end of the prompt looks at.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469,
section 4 and listing 1. The last queries of the prompt, the observation window, vote by their
attention for the tokens before them; votes are pooled over neighbouring positions, so that a token
brings its surroundings along; each head keeps the highest and the window. This happens once, after
the prompt; decoding appends. Window 32, max-pooling over 7 (section 5.3, LongBench).

GQA: the public code repeats keys and values for each query head and lets it choose for itself,
which takes a group's size times the bytes. Here the votes of a group are averaged, so that a KV
head is stored once.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import (
    Budget,
    Selection,
    Step,
    equal_sizes,
    highest,
    share,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV:
    """The policy of SnapKV; the module's docstring describes it."""

    name: ClassVar[str] = "SnapKV"
    keeps_written: ClassVar[bool] = True
    window: int = 32
    kernel: int = 7  # positions that are pooled; odd

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Keep the observation window and the tokens that it votes for."""
        sizes = equal_sizes(prompt, budget)
        count = sizes - budget.room
        scores = window_votes(prompt, window=self.window, kernel=self.kernel, count=count)
        return Selection(kept=highest(scores, count), sizes=sizes)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the share of a head."""
        return share(prompt, budget)

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Keep everything."""
        del state
        return step.held.exists


def window_votes(
    prompt: Prompt, *, window: int, kernel: int, count: Int[Array, "*#heads"] | int
) -> Float[Array, "batch layers kv_heads length"]:
    """Return the pooled votes, inf for the window itself and -inf for padding.

    Where a head keeps fewer tokens than the window, its `count` latest ones are inf.
    """
    positions = jnp.arange(prompt.tokens.shape[1])[None, None, None]
    latest = jnp.clip(count, 0, window)
    observed = positions < (prompt.lengths[:, None, None] - latest)[..., None]
    votes = jnp.where(observed, prompt.received, 0)
    votes = jax.lax.reduce_window(
        votes, -jnp.inf, jax.lax.max, (1, 1, 1, kernel), (1, 1, 1, 1), "SAME"
    )
    return jnp.where(prompt.exists, jnp.where(observed, votes, jnp.inf), -jnp.inf)
