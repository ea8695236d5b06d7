"""Decode from a pool: attend to what each head holds and the new token; then the policy evicts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from duo_jax.evaluate.eviction.cache import FREE, Held, Pool
from duo_jax.evaluate.eviction.policy import Policy, Step
from duo_jax.heads.split import DuoConfig
from duo_jax.model import llama, rope
from duo_jax.model.llama import Params
from kernels.precision import accumulator


def decode(
    config: DuoConfig,
    params: Params,
    policy: Policy,
    pool: Pool,
    state: Any,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Float[Array, "batch embed"], Pool]:
    """Append one token to every active row; return the residual stream after it.

    Args:
      config: the model.
      params: its parameters, in serving form.
      policy: the eviction method.
      pool: the tokens that are kept so far.
      state: the policy's, see `Selection`.
      tokens: one per row.
      active: rows that take part; the others keep what they have, and their streams mean nothing.
    """

    def attend(
        index: int,
        q: Float[Array, "batch q_heads head_dim"],
        k: Float[Array, "batch kv_heads head_dim"],
        v: Float[Array, "batch kv_heads head_dim"],
        pool: Pool,
    ) -> tuple[Float[Array, "batch 1 q_heads head_dim"], Pool]:
        layer_state = jax.tree.map(lambda leaf: leaf[:, index], state)
        return _attend(policy, pool, layer_state, index, tokens, active, q, k, v)

    x, pool = through_layers(config, params, attend, pool, pool.lengths, tokens, active)
    pool = dataclasses.replace(pool, lengths=pool.lengths + active.astype(jnp.int32))
    return x, pool


def through_layers(
    config: DuoConfig,
    params: Params,
    attend: Callable[..., tuple[Float[Array, "batch 1 q_heads head_dim"], Any]],
    cache: Any,
    lengths: Int[Array, " batch"],
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Float[Array, "batch embed"], Any]:
    """Run a token of every row through all layers, whatever the cache.

    Args:
      config: the model.
      params: its parameters, in serving form.
      attend: attends from a token to a layer's cache, and changes it; takes the layer's number,
        query, key and value [batch, heads, head_dim], and the cache.
      cache: of all layers.
      lengths: tokens of each row so far.
      tokens: one per row.
      active: rows to which their token is appended.

    Returns:
      The residual stream, and the cache.
    """
    cos_sin = rope.rotation(
        config.architecture,
        lengths[:, None],
        total_length=lengths + active.astype(jnp.int32),
    )
    x = params["embed_tokens"]["embedding"][tokens[:, None]]
    for index, layer_params in enumerate(params["layers"]):

        def attend_layer(
            q: Float[Array, "batch 1 q_heads head_dim"],
            k: Float[Array, "batch 1 kv_heads head_dim"],
            v: Float[Array, "batch 1 kv_heads head_dim"],
            layer_input: tuple[Any, int],
        ) -> tuple[Float[Array, "batch 1 q_heads head_dim"], Any]:
            cache, index = layer_input
            return attend(index, q[:, 0], k[:, 0], v[:, 0], cache)

        layer = llama.DecoderLayer(config.architecture, attend=attend_layer)
        out: Any = layer.apply({"params": layer_params}, x, cos_sin, (cache, index))
        x, cache = out
    return x[:, 0], cache


def _attend(
    policy: Policy,
    pool: Pool,
    state: Any,
    layer: int,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
    q: Float[Array, "batch q_heads head_dim"],
    k: Float[Array, "batch kv_heads head_dim"],
    v: Float[Array, "batch kv_heads head_dim"],
) -> tuple[Float[Array, "batch 1 q_heads head_dim"], Pool]:
    batch, kv_heads, head_dim = k.shape
    starts, sizes = pool.starts[:, layer], pool.sizes[:, layer]
    before = jax.tree.map(lambda x: x[:, layer], pool.held)
    offsets = jnp.arange(before.positions.shape[-1], dtype=jnp.int32)[None, None]
    own = offsets < sizes[..., None]  # [batch, kv_heads, slots]
    # Segments are read as if all were as long as the longest: what lies beyond counts 0.
    slots = jnp.where(own, starts[..., None] + offsets, 0)
    rows = jnp.arange(batch)[:, None, None]
    old_keys, old_values = pool.keys[rows, slots], pool.values[rows, slots]

    def with_new(
        old: Shaped[Array, "batch kv_heads slots"], new: Shaped[Array, "batch kv_heads"]
    ) -> Shaped[Array, "batch kv_heads held"]:
        return jnp.concatenate([old, new[..., None].astype(old.dtype)], axis=-1)

    def each_head(x: Int[Array, " batch"]) -> Int[Array, "batch kv_heads"]:
        return jnp.broadcast_to(x[:, None], (batch, kv_heads))

    keys = jnp.concatenate([old_keys, k[:, :, None]], axis=2)
    values = jnp.concatenate([old_values, v[:, :, None]], axis=2)
    positions = with_new(before.positions, each_head(pool.lengths))
    attention, out = _attention(q, keys, values, positions != FREE)
    held = Held(
        positions=positions,
        tokens=with_new(before.tokens, each_head(tokens)),
        received=with_new(before.received, jnp.zeros((batch, kv_heads))) + attention,
    )
    step = Step(held=held, attention=attention, now=pool.lengths, sizes=sizes)
    kept = policy.keep(step, state) & held.exists

    # The new token goes to the first free slot; other slots only lose or keep what they hold.
    stays = jnp.where(kept[..., :-1], held.positions[..., :-1], FREE)
    free = own & (stays == FREE)
    takes = kept[..., -1] & free.any(axis=-1) & active[:, None]
    new = (offsets == jnp.argmax(free, axis=-1)[..., None]) & takes[..., None]

    def update(
        old: Shaped[Array, "batch kv_heads slots"], after: Shaped[Array, "batch kv_heads held"]
    ) -> Shaped[Array, "batch kv_heads slots"]:
        """Return a layer's numbers after the step; inactive rows keep theirs."""
        after = jnp.where(new, after[..., -1:], after[..., :-1])
        return jnp.where(active[:, None, None], after, old)

    left = dataclasses.replace(held, positions=with_new(stays, held.positions[..., -1]))
    after = jax.tree.map(update, before, left)
    first = jnp.sum(jnp.where(new, slots, 0), axis=-1)  # the new token's slot
    pool = dataclasses.replace(
        pool,
        keys=_write_one(pool.keys, k, first, takes),
        values=_write_one(pool.values, v, first, takes),
        held=jax.tree.map(lambda all_, x: all_.at[:, layer].set(x), pool.held, after),
    )
    return out.reshape(batch, 1, -1, head_dim), pool


def _attention(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    exists: Bool[Array, "batch kv_heads slots"],
) -> tuple[Float[Array, "batch kv_heads slots"], Float[Array, "batch kv_heads group head_dim"]]:
    """Return the weights, mean over each head's group, and the output."""
    batch, kv_heads, _, head_dim = keys.shape
    wide = accumulator(q.dtype)
    grouped = q.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=wide)
    scores = jnp.where(exists[:, :, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values)
    return weights.mean(axis=2).astype(jnp.float32), out


def _write_one(
    buffer: Float[Array, "batch slots head_dim"],
    new: Float[Array, "batch kv_heads head_dim"],
    slot: Int[Array, "batch kv_heads"],
    takes: Bool[Array, "batch kv_heads"],
) -> Float[Array, "batch slots head_dim"]:
    goal = jnp.where(takes, slot, buffer.shape[1])
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], goal].set(new, mode="drop")
