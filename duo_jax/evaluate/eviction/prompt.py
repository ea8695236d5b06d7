"""Read prompts with full attention, as the eviction papers do, and sum what policies look at.

Keys and values of all layers are kept until the policy has chosen, so the peak is a full cache.
The attention that a token has received is summed over blocks of queries: there is never a whole
attention matrix.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from duo_jax import serve
from duo_jax.evaluate.eviction.cache import Prompt
from duo_jax.heads.split import DuoConfig
from duo_jax.mesh import devices
from duo_jax.model import llama, rope
from duo_jax.model.llama import Params
from duo_jax.session.runtime import Runtime
from kernels import Implementation, full_attention
from kernels.precision import accumulator

_BLOCK = 64  # queries whose scores exist at a time


@runtime_checkable
class Noting(Protocol):
    """A method that needs more of a layer than keys, values and attention; hashable."""

    def note(
        self,
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """Return what is kept of a layer, see Prompt.noted."""
        ...


def read_with(
    runtime: Runtime,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    window: int | None,
    noting: Noting | None = None,
) -> Prompt:
    """Do what `read` does with a model that is loaded, on its devices."""
    with devices.within(runtime.mesh):
        return read(
            runtime.config,
            runtime.params,
            tokens,
            lengths,
            window=window,
            noting=noting,
            implementation=runtime.implementation,
        )


@functools.partial(jax.jit, static_argnames=("config", "window", "noting", "implementation"))
def read(
    config: DuoConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    window: int | None,
    noting: Noting | None = None,
    implementation: Implementation = "auto",
) -> Prompt:
    """Read a batch of prompts.

    Args:
      config: a model whose heads are all retrieval heads.
      params: its parameters, in serving form.
      tokens: the prompts; row b counts up to lengths[b], the rest is padding.
      lengths: tokens per row, at least 1.
      window: how many of each row's last queries count in `Prompt.received`; None: all.
      noting: a method that notes something of every layer.
      implementation: attention implementation, see kernels.dispatch.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    cos_sin = rope.rotation(config.architecture, positions, total_length=lengths)
    x = params["embed_tokens"]["embedding"][tokens]

    def attend(
        q: Float[Array, "batch length q_heads head_dim"],
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        layer_input: None,
    ) -> tuple[Float[Array, "batch length q_heads head_dim"], tuple[tuple[Array, ...], Any]]:
        del layer_input
        scale = q.shape[-1] ** -0.5
        out = full_attention(q, k, v, softmax_scale=scale, implementation=implementation)
        keys, values = (jnp.swapaxes(part, 1, 2) for part in (k, v))
        noted = None if noting is None else noting.note(q, k, lengths)
        return out, ((keys, values, received(q, k, lengths, window=window)), noted)

    read_layers, notes = [], []
    for layer_params in params["layers"]:
        layer = llama.DecoderLayer(config.architecture, attend=attend)
        x, (of_layer, note) = layer.apply({"params": layer_params}, x, cos_sin, None)
        read_layers.append(of_layer)
        notes.append(note)
    keys, values, sums = (jnp.stack(part, axis=1) for part in zip(*read_layers, strict=True))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return Prompt(
        keys=keys,
        values=values,
        received=sums,
        noted=None if noting is None else jnp.stack(notes, axis=1),
        tokens=tokens,
        lengths=lengths,
        logits=serve.logits(config, params, last)[:, 0],
    )


def received(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    lengths: Int[Array, " batch"],
    *,
    window: int | None,
) -> Float[Array, "batch kv_heads length"]:
    """Return the attention that each key gets from the last queries, mean over a head's group."""
    batch, length, kv_heads, head_dim = k.shape
    count = length if window is None else min(window, length)
    # The last `count` queries of each row, in whole blocks; what lies before the text counts 0.
    padded = -(-count // _BLOCK) * _BLOCK
    offsets = jnp.arange(padded, dtype=jnp.int32)
    queries = lengths[:, None] - count + offsets[None, :]
    counts = (offsets < count)[None, :] & (queries >= 0) & (queries < lengths[:, None])
    key_positions = jnp.arange(length, dtype=jnp.int32)
    wide = accumulator(q.dtype)

    def one_block(
        total: Float[Array, "batch kv_heads length"],
        block: tuple[Int[Array, "batch block"], Bool[Array, "batch block"]],
    ) -> tuple[Float[Array, "batch kv_heads length"], None]:
        at, count_in = block
        chosen = jnp.take_along_axis(q, jnp.clip(at, 0, length - 1)[:, :, None, None], axis=1)
        grouped = chosen.reshape(batch, _BLOCK, kv_heads, -1, head_dim)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide)
        visible = (key_positions[None, None, :] <= at[:, :, None])[:, None, None]
        scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
        # A query before the text sees nothing; its weights are left out, not its nan added.
        attention = jax.nn.softmax(jnp.where(count_in[:, None, None, :, None], scores, 0), axis=-1)
        counted = jnp.where(count_in[:, None, None, :, None], attention, 0)
        return total + counted.mean(axis=2).sum(axis=2).astype(jnp.float32), None

    def in_blocks(x: Shaped[Array, "batch queries"]) -> Shaped[Array, "blocks batch block"]:
        return jnp.swapaxes(x.reshape(batch, -1, _BLOCK), 0, 1)

    blocks = (in_blocks(queries), in_blocks(counts))
    total, _ = jax.lax.scan(one_block, jnp.zeros((batch, kv_heads, length), jnp.float32), blocks)
    return total
