"""The cache of a method that evicts tokens: every KV head keeps its own, and only they take bytes.

All kept keys and values of a row lie in one pool, segment after segment: layer 0 head 0, layer 0
head 1, and so on. A segment is as long as its head may keep tokens, so heads, layers and rows can
differ and the bytes of the pool are the bytes of what is kept (Ada-KV, arXiv 2407.11550, lays out
its cache in this way). Keys carry the rotation of their original positions, so the order within a
segment means nothing; a slot whose token was evicted is free for the next one.

Beside keys and values the policies keep three numbers per slot: position, token and the attention
it has received. They lie in arrays of their own, padded to the longest segment, and are not counted
as KV bytes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import pytree

FREE = -1  # position of a slot that holds nothing


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Facts about the tokens that heads hold, by which policies choose."""

    positions: Int[Array, "*heads slots"]  # in the text; FREE where there is none
    tokens: Int[Array, "*heads slots"]
    received: Float[Array, "*heads slots"]  # sum over queries of the group's mean attention

    @property
    def exists(self) -> Bool[Array, "*heads slots"]:
        """Which slots hold a token."""
        return self.positions != FREE


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """All tokens that are kept of a batch of texts."""

    keys: Float[Array, "batch slots head_dim"]  # rotated
    values: Float[Array, "batch slots head_dim"]
    held: Held  # [batch, layers, kv_heads, longest]
    starts: Int[Array, "batch layers kv_heads"]  # first slot of each segment
    sizes: Int[Array, "batch layers kv_heads"]  # its slots
    lengths: Int[Array, " batch"]  # tokens read so far, kept or not

    def live_bytes(self) -> int:
        """Return the bytes that the buffers of keys and values take on their device."""
        return sum(x.on_device_size_in_bytes() for x in (self.keys, self.values))

    def held_bytes(self) -> Float[Array, " batch"]:
        """Return, per row, the bytes of the tokens that are held: without free slots."""
        token = 2 * self.keys.shape[-1] * self.keys.dtype.itemsize
        return jnp.sum(self.held.exists, axis=(1, 2, 3)).astype(jnp.float32) * token


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A batch of texts after the model has read them with full attention."""

    keys: Float[Array, "batch layers kv_heads length head_dim"]  # rotated
    values: Float[Array, "batch layers kv_heads length head_dim"]
    received: Float[Array, "batch layers kv_heads length"]  # see Held, of the observed queries
    tokens: Int[Array, "batch length"]
    lengths: Int[Array, " batch"]  # beyond them is padding
    logits: Float[Array, "batch vocab"]  # after each row's last token
    noted: Any = None  # what a method notes of each layer, [batch, layers, ...]

    @property
    def exists(self) -> Bool[Array, "batch 1 1 length"]:
        """Which positions are not padding."""
        return (jnp.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None])[:, None, None]


def compress(
    prompt: Prompt,
    kept: Bool[Array, "batch layers kv_heads length"],
    sizes: Int[Array, "batch layers kv_heads"],
    *,
    slots: int,
    longest: int,
) -> Pool:
    """Keep some tokens of a prompt.

    Args:
      prompt: the prompt, read.
      kept: which tokens each head keeps; at most `sizes` of them.
      sizes: slots of each head.
      slots: of a row's pool; at least the sum of a row's sizes.
      longest: at least the largest size.
    """
    batch, layers, heads, length, _ = prompt.keys.shape
    starts = _starts(sizes)
    rank = jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
    goal = jnp.where(kept, starts[..., None] + rank, slots).reshape(batch, -1)
    # The inverse of `rank`: the position of each segment's i-th token.
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :longest].astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, 0), (0, longest - order.shape[-1])))
    number = jnp.sum(kept, axis=-1, dtype=jnp.int32)[..., None]
    exists = jnp.arange(longest, dtype=jnp.int32)[None, None, None] < number
    held = Held(
        positions=jnp.where(exists, order, FREE),
        tokens=jnp.take_along_axis(prompt.tokens[:, None, None], order, axis=-1),
        received=jnp.where(exists, jnp.take_along_axis(prompt.received, order, axis=-1), 0),
    )

    def place(
        x: Float[Array, "batch layers kv_heads length head_dim"],
    ) -> Float[Array, "batch slots head_dim"]:
        flat = x.reshape(batch, layers * heads * length, x.shape[-1])
        empty = jnp.zeros((batch, slots, x.shape[-1]), x.dtype)
        return empty.at[jnp.arange(batch)[:, None], goal].set(flat, mode="drop")

    return Pool(
        keys=place(prompt.keys),
        values=place(prompt.values),
        held=held,
        starts=starts,
        sizes=sizes,
        lengths=prompt.lengths,
    )


def _starts(
    sizes: Int[Array, "batch layers kv_heads"],
) -> Int[Array, "batch layers kv_heads"]:
    flat = sizes.reshape(sizes.shape[0], -1)
    return (jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - flat).reshape(sizes.shape)
