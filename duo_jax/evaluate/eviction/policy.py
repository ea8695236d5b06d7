"""A token-eviction method: which tokens stay after the prompt, and after each decoding step."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from duo_jax.evaluate.eviction.cache import Held, Prompt
from duo_jax.session.runtime import Runtime


class Budget(NamedTuple):
    """Slots that a method may use."""

    slots: int  # of a row, over all its heads, to the end of decoding
    room: int  # tokens that will be decoded; heads that keep all of them need as many free slots


class Selection(NamedTuple):
    """The tokens of a prompt that stay."""

    kept: Bool[Array, "batch layers kv_heads length"]
    sizes: Int[Array, "batch layers kv_heads"]  # slots of each head, for kept and future tokens
    state: Any = None  # for `keep`: a tree of arrays [batch, layers, kv_heads, ...]


class Step(NamedTuple):
    """A decoding step of one layer, after its attention; the new token is the last slot."""

    held: Held  # [batch, kv_heads, held]: all slots and one more
    attention: Float[Array, "batch kv_heads held"]  # of the new query, mean of the group
    now: Int[Array, " batch"]  # position of the new token
    sizes: Int[Array, "batch kv_heads"]  # slots of each head


@runtime_checkable
class Policy(Protocol):
    """A method: a frozen dataclass, hashable, static under jax.jit."""

    name: ClassVar[str]
    keeps_written: ClassVar[bool]  # what is decoded stays; only the prompt is evicted from
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def window(self) -> int | None:
        """How many of the prompt's last queries count in Prompt.received; None: all."""
        ...

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        """Choose what stays of a prompt."""
        ...

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        """Return how many slots a head gets at most."""
        ...

    def keep(self, step: Step, state: Any) -> Bool[Array, "batch kv_heads held"]:
        """Choose what stays after a step, of the slots that hold a token."""
        ...


@runtime_checkable
class Rereads(Protocol):
    """A policy that has the model read the prompt once more, to score its keys."""

    def reread(
        self, runtime: Runtime, tokens: Int[Array, "batch length"], lengths: Int[Array, " batch"]
    ) -> Float[Array, "batch layers kv_heads length"]:
        """Return what takes the place of Prompt.received."""
        ...


def share(prompt: Prompt, budget: Budget) -> int:
    """Return the slots of a head where all heads get equally many."""
    _, layers, heads, _, _ = prompt.keys.shape
    return budget.slots // (layers * heads)


def equal_sizes(prompt: Prompt, budget: Budget) -> Int[Array, "batch layers kv_heads"]:
    """Return `share` for every head."""
    return jnp.full(prompt.keys.shape[:3], share(prompt, budget), jnp.int32)


def all_but_lowest(
    scores: Float[Array, "*heads held"], held: Held, sizes: Int[Array, "*heads"]
) -> Bool[Array, "*heads held"]:
    """Return what stays when a full cache loses its lowest score; of equal ones the first goes."""
    lowest = jnp.argmin(jnp.where(held.exists, scores, jnp.inf), axis=-1)
    too_many = jnp.sum(held.exists, axis=-1, dtype=jnp.int32) > sizes
    goes = jax.nn.one_hot(lowest, scores.shape[-1], dtype=bool) & too_many[..., None]
    return held.exists & ~goes


def highest(
    scores: Float[Array, "*heads slots"], count: Int[Array, "*#heads"] | int
) -> Bool[Array, "*heads slots"]:
    """Return the `count` highest scores above -inf; of equal ones the first."""
    # By the count-th highest score and a count of its equals: ranks would need two sorts of pairs.
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), scores.shape[:-1])
    ascending = jnp.sort(scores, axis=-1)
    at = jnp.clip(scores.shape[-1] - count, 0, scores.shape[-1] - 1)
    bound = jnp.take_along_axis(ascending, at[..., None], axis=-1)
    above = scores > bound
    left = count[..., None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    equal = scores == bound
    first = equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left)
    return (above | first) & (scores > -jnp.inf) & (count > 0)[..., None]
