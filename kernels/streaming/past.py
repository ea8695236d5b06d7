"""The cached tokens before a chunk that its streaming heads need."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import limits, pytree


@pytree.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """Sinks and recent tokens before a chunk, in order of position."""

    sink_keys: Float[Array, "batch kv_heads sink head_dim"]  # position = index; may be unfilled
    sink_values: Float[Array, "batch kv_heads sink head_dim"]
    recent_keys: Float[Array, "batch kv_heads recent head_dim"]  # the last is just before the chunk
    recent_values: Float[Array, "batch kv_heads recent head_dim"]  # finite where unfilled too
    lengths: Int[Array, " batch"]  # tokens before the chunk

    def buffers(self) -> tuple[Array, ...]:
        """Return keys and values."""
        return self.sink_keys, self.sink_values, self.recent_keys, self.recent_values

    def check(self, k: Float[Array, "batch length kv_heads head_dim"], *, sink_size: int) -> None:
        """Refuse a past that does not fit a chunk's keys.

        Raises:
          ValueError: the number of rows, heads or sinks, or head_dim, differ.
        """
        batch, _, kv_heads, head_dim = k.shape
        sinks = (batch, kv_heads, sink_size, head_dim)
        recents = (batch, kv_heads, self.recent_keys.shape[2], head_dim)
        for x, shape in zip(self.buffers(), (sinks, sinks, recents, recents), strict=True):
            if x.shape != shape:
                raise ValueError(f"a past of {x.shape} does not fit: {shape} is needed")
        limits.check_rows("past lengths", self.lengths, batch)


def nothing(
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
) -> Past:
    """Return the past of a chunk that begins its sequence: its own sinks, no recent tokens."""
    sink_keys, sink_values = (jnp.moveaxis(x[:, :sink_size], 2, 1) for x in (k, v))
    empty = jnp.zeros((*sink_keys.shape[:2], 0, k.shape[3]), k.dtype)
    return Past(
        sink_keys=sink_keys,
        sink_values=sink_values,
        recent_keys=empty,
        recent_values=empty,
        lengths=jnp.zeros(k.shape[0], jnp.int32),
    )
