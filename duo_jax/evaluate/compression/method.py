"""A method that makes a cache smaller in another way than by evicting tokens.

It keeps the text in a form of its own: fewer channels, lower rank, fewer heads. What belongs to a
method is how it compresses a prompt and how a query attends to the result.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.model.config import ModelConfig
from kernels import pytree
from kernels.precision import accumulator


class Shape(NamedTuple):
    """What a cache is for."""

    layers: int
    kv_heads: int
    head_dim: int
    length: int  # tokens of the longest text
    room: int  # tokens after it

    def numbers(self, budget: float) -> float:
        """Return how many numbers of keys and values one KV head of one layer may have."""
        return budget * (self.length + self.room) * 2 * self.head_dim + 1e-6


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
    """A batch of texts in a method's form."""

    counted: Mapping[str, Float[Array, "batch ..."]]  # keys and values on the device
    beside: PyTree  # places and orders, which are not counted, as those of evicting methods
    on_host: Mapping[str, Float[Array, "batch ..."]] = dataclasses.field(default_factory=dict)
    starts: Int[Array, " batch"]  # tokens of the texts
    lengths: Int[Array, " batch"]  # tokens so far

    def live_bytes(self) -> int:
        """Return the bytes that keys and values take on the device."""
        return sum(x.on_device_size_in_bytes() for x in self.counted.values())

    def host_bytes(self) -> int:
        """Return the bytes that the method keeps in the memory of the host."""
        return sum(x.on_device_size_in_bytes() for x in self.on_host.values())


class New(NamedTuple):
    """A token of every row, as a layer sees it."""

    q: Float[Array, "batch kv_heads group head_dim"]
    k: Float[Array, "batch kv_heads head_dim"]
    v: Float[Array, "batch kv_heads head_dim"]
    active: Bool[Array, " batch"]  # rows to which it belongs


@runtime_checkable
class Compression(Protocol):
    """A method with its setting: a frozen dataclass, hashable, static under jax.jit."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def window(self) -> int | None:
        """How many of the prompt's last queries count in Prompt.received; None: all."""
        ...

    def note(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """Return what is needed of a layer beside keys and values: Prompt.noted."""
        ...

    def compress(self, architecture: ModelConfig, prompt: Prompt, *, room: int) -> Compressed:
        """Bring a prompt into the method's form, with room for as many tokens."""
        ...

    def attend(
        self, architecture: ModelConfig, cache: Compressed, layer: int, new: New
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], Compressed]:
        """Append a token to a layer of every active row, and attend to what is there."""
        ...


class Part(NamedTuple):
    """Some of the keys and values that a query sees."""

    q: Float[Array, "batch kv_heads group channels"]
    keys: Float[Array, "batch kv_heads slots channels"]
    values: Float[Array, "batch kv_heads slots head_dim"]
    exists: Bool[Array, "batch #kv_heads slots"]


def attention(
    parts: Sequence[Part], *, head_dim: int
) -> Float[Array, "batch kv_heads group head_dim"]:
    """Attend to all parts together."""
    scores = []
    for part in parts:
        wide = accumulator(part.q.dtype)
        of_part = jnp.einsum("bkgh,bksh->bkgs", part.q, part.keys, preferred_element_type=wide)
        scores.append(jnp.where(part.exists[:, :, None], of_part * head_dim**-0.5, -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    values = jnp.concatenate([part.values for part in parts], axis=2)
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values)


def first(
    count: Int[Array, "batch layers kv_heads"], slots: int
) -> Bool[Array, "batch layers kv_heads slots"]:
    """Return which slots hold something, where the first ones do."""
    return jnp.arange(slots)[None, None, None] < count[..., None]


def written(cache: Compressed) -> Int[Array, " batch"]:
    """Return how many tokens each row has had after its text."""
    return cache.lengths - cache.starts


def append(
    buffer: Float[Array, "batch layers heads slots head_dim"],
    layer: int,
    new: Float[Array, "batch heads head_dim"],
    slots: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> Float[Array, "batch layers heads slots head_dim"]:
    """Write a token of every active row into its slot."""
    goal = jnp.where(active, slots, buffer.shape[3])  # beyond the buffer: dropped
    return buffer.at[jnp.arange(buffer.shape[0]), layer, :, goal].set(new, mode="drop")


def append_written(cache: Compressed, layer: int, new: New) -> tuple[Compressed, Part]:
    """Write a token into "written_keys" and "written_values"; return them as the query sees them.

    The new token is seen by its own query, also where a row is not active.
    """
    slots = written(cache)
    names = {"written_keys": new.k, "written_values": new.v}
    after = {
        name: append(cache.counted[name], layer, x, slots, new.active) for name, x in names.items()
    }
    cache = dataclasses.replace(cache, counted={**cache.counted, **after})
    keys, values = (buffer[:, layer] for buffer in after.values())
    exists = jnp.arange(keys.shape[2])[None] <= slots[:, None]
    return cache, Part(new.q, keys, values, exists[:, None])


def room_for_written(
    prompt: Prompt, room: int
) -> dict[str, Float[Array, "batch layers kv_heads room head_dim"]]:
    """Return empty buffers for what is written."""
    batch, layers, kv_heads, _, head_dim = prompt.keys.shape
    empty = jnp.zeros((batch, layers, kv_heads, room, head_dim), prompt.keys.dtype)
    return {"written_keys": empty, "written_values": empty}
