"""FastGen: a policy for every head, by what recovers its attention.

Ge et al., "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs", arXiv
2310.01801, sections 3.3 and 3.4, algorithms 1 and 2. After the prompt each head takes the cheapest
of five policies whose tokens hold at least the fraction T of the prompt's attention (equation 1):

    special tokens | + punctuation | + frequent | + local | everything

Frequent are the 30% of tokens with the highest attention accumulated over all queries, local the
latest 30% of the text (section 5.1: r_f = r_l = 0.3). Every policy holds those before it. Decoding
goes on with the head's policy: it evicts at every step.

Budget: only T changes, as in the paper's experiments. For every text it is the highest T whose
caches, over all heads, fit; since heads change policy as a whole, some of the budget may stay
unused. Every head gets room for all that will be decoded: a head with the last policy appends, and
the others may.

GQA: the paper leaves it to future work; here attention is averaged over a group.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.evaluate.eviction.policy import Budget, Selection, Step, highest

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL = range(5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastGen:
    """The policy of FastGen; the module's docstring describes it."""

    name: ClassVar[str] = "FastGen"
    keeps_written: ClassVar[bool] = True
    window: int | None = None
    special: tuple[int, ...]  # tokens such as the beginning of a text
    punctuation: tuple[int, ...]
    frequent_ratio: float = 0.3
    local_ratio: float = 0.3

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Choose the highest threshold that fits, by it each head's policy."""
        shape = prompt.received.shape
        positions = jnp.broadcast_to(jnp.arange(shape[-1])[None, None, None], shape)
        tokens = jnp.broadcast_to(prompt.tokens[:, None, None], shape)
        scores = jnp.where(prompt.exists, prompt.received, -jnp.inf)
        lengths = prompt.lengths[:, None, None]
        held = self._held_by(tokens, positions, scores, lengths)  # [batch, layers, heads, 5, slots]
        held = held & prompt.exists[:, :, :, None]
        recovered = jnp.sum(jnp.where(held, prompt.received[..., None, :], 0), axis=-1)
        # Rounding must not carry a head beyond what the full cache recovers, nor that below 1.
        recovered = jnp.minimum(recovered / lengths[..., None].astype(jnp.float32), 1.0)
        recovered = recovered.at[..., FULL].set(1.0)
        cost = held.sum(axis=-1, dtype=jnp.int32) + budget.room
        kind = jax.vmap(_kinds, in_axes=(0, 0, None))(recovered, cost, budget.slots)
        kept = jnp.take_along_axis(held, kind[..., None, None], axis=-2)[..., 0, :]
        sizes = kept.sum(axis=-1, dtype=jnp.int32) + budget.room
        return Selection(kept=kept, sizes=sizes, state=kind)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return the length of the text, with room: a head may keep all of it."""
        return min(budget.slots, prompt.tokens.shape[1] + budget.room)

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Go on with each head's policy."""
        exists = step.held.exists
        scores = jnp.where(exists, step.held.received, -jnp.inf)
        lengths = jnp.broadcast_to(step.now[:, None] + 1, step.sizes.shape)
        held = self._held_by(step.held.tokens, step.held.positions, scores, lengths)
        return jnp.take_along_axis(held, state[..., None, None], axis=-2)[..., 0, :] & exists

    def _held_by(
        self,
        tokens: Int[Array, "*heads slots"],
        positions: Int[Array, "*heads slots"],
        scores: Float[Array, "*heads slots"],
        lengths: Int[Array, "*#heads"],
    ) -> Bool[Array, "*heads 5 slots"]:
        """Return the tokens that each of the five policies holds of a text of `lengths` tokens."""
        special = _is_one_of(tokens, self.special)
        punctuation = special | _is_one_of(tokens, self.punctuation)
        number = _part(lengths, self.frequent_ratio)
        frequent = punctuation | highest(scores, jnp.broadcast_to(number, scores.shape[:-1]))
        number = _part(lengths, self.local_ratio)
        local = frequent | (positions >= (lengths - number)[..., None])
        return jnp.stack([special, punctuation, frequent, local, jnp.ones_like(local)], axis=-2)


def _kinds(
    recovered: Float[Array, "layers kv_heads 5"], cost: Int[Array, "layers kv_heads 5"], slots: int
) -> Int[Array, "layers kv_heads"]:
    """Return one text's policies at the highest threshold whose cost fits."""
    thresholds = recovered.reshape(-1)

    def at(threshold: Float[Array, ""]) -> tuple[Int[Array, "layers kv_heads"], Int[Array, ""]]:
        # argmax gives the first, hence cheapest, policy that recovers enough.
        kind = jnp.argmax(recovered >= threshold, axis=-1)
        return kind, jnp.take_along_axis(cost, kind[..., None], axis=-1).sum()

    totals = jax.lax.map(lambda threshold: at(threshold)[1], thresholds)
    best = jnp.max(jnp.where(totals <= slots, thresholds, 0.0))
    return at(best)[0].astype(jnp.int32)


def _part(lengths: Int[Array, "*heads"], ratio: float) -> Int[Array, "*heads"]:
    return jnp.floor(lengths.astype(jnp.float32) * ratio).astype(jnp.int32)


def _is_one_of(tokens: Int[Array, "*shape"], chosen: tuple[int, ...]) -> Bool[Array, "*shape"]:
    if not chosen:
        return jnp.zeros(tokens.shape, bool)
    ordered = jnp.array(sorted(chosen), jnp.int32)
    at = jnp.clip(jnp.searchsorted(ordered, tokens), 0, len(chosen) - 1)
    return ordered[at] == tokens
