"""Evict tokens from full caches: retrieval heads keep those that were looked at most.

Every head of every layer keeps equally many, its own. What stays moves to the first slots, in order
of position, and into buffers of fewer slots, so that bytes are freed. Keys carry the rotation of
their positions, so attention needs to know nothing more than how many slots are filled. Rings of
streaming heads stay as they are.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from duo_jax.cache import stripes
from duo_jax.cache.state import Cache, KVCache, LayerCache
from duo_jax.mesh.devices import DATA, MODEL, AnyMesh, num_parts

# SnapKV (arXiv 2404.14469, section 5.3): the votes of neighbours are pooled, so that a token brings
# its surroundings along; the latest tokens, which voted, all stay.
_POOLED = 7  # slots, odd
LATEST = 32  # tokens


def evict(cache: Cache, keep: Sequence[int], *, slots: int) -> Cache:
    """Return a cache that holds `keep[b]` tokens of row b in each full cache.

    Layers are made one by one; if the caller holds the cache no more, so are the old ones freed.
    Of several devices that share it, each gathers a layer's tokens from all, and takes its own.

    Args:
      cache: its full caches have votes; used up.
      keep: tokens that stay, per row, at most as many as there are.
      slots: of the new buffers, at least the largest of `keep`.
    """
    before, after = cache.kept, jnp.array(np.asarray(keep), jnp.int32)
    layers, lengths, mesh = list(cache.layers), cache.lengths, cache.mesh
    slots = stripes.whole(slots, num_parts(mesh))
    del cache
    for number, layer in enumerate(layers):
        full = tuple(_compacted(part, before, after, slots=slots, mesh=mesh) for part in layer.full)
        layers[number] = LayerCache(full=full, streaming=layer.streaming)
        del layer
    return Cache(layers=tuple(layers), lengths=lengths, kept=after, mesh=mesh)


def without_votes(cache: Cache) -> Cache:
    """Return a cache, used up, with all its votes at 0."""

    def without(part: KVCache) -> KVCache:
        assert part.votes is not None
        return dataclasses.replace(part, votes=jnp.zeros_like(part.votes))

    layers = (
        dataclasses.replace(layer, full=tuple(map(without, layer.full))) for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=tuple(layers))


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _compacted(
    part: KVCache,
    kept: Int[Array, " batch"],
    keep: Int[Array, " batch"],
    *,
    slots: int,
    mesh: AnyMesh | None,
) -> KVCache:
    """Return the chosen tokens of every head, in buffers of `slots`."""
    assert part.votes is not None
    if mesh is None:
        at = _chosen(part.votes, kept, keep, slots=slots)
        return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, at, axis=2), part)
    rows, specs = PartitionSpec(DATA), jax.tree.map(lambda _: stripes.FULL, part)
    local = functools.partial(_compacted_stripe, slots=slots, num=num_parts(mesh))
    some = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, rows, rows), out_specs=specs, check_vma=False
    )
    return some(part, kept, keep)


def _compacted_stripe(
    part: KVCache, kept: Int[Array, " batch"], keep: Int[Array, " batch"], *, slots: int, num: int
) -> KVCache:
    """Return those of the chosen tokens that one of several devices holds from now on."""

    def in_order(leaf: Shaped[Array, "batch kv_heads slots _"]) -> Array:
        every = jax.lax.all_gather(leaf, MODEL, axis=2, tiled=True)
        return stripes.in_order(every, num)

    assert part.votes is not None
    at = _chosen(in_order(part.votes), kept, keep, slots=slots)
    own = jnp.stack(jnp.split(stripes.by_device(at, num), num, axis=2))[jax.lax.axis_index(MODEL)]
    return jax.tree.map(lambda leaf: jnp.take_along_axis(in_order(leaf), own, axis=2), part)


def _chosen(
    votes: Float[Array, "batch kv_heads slots 1"],
    kept: Int[Array, " batch"],
    keep: Int[Array, " batch"],
    *,
    slots: int,
) -> Int[Array, "batch kv_heads _ 1"]:
    """Return the slots of the tokens that stay, in order; then any, up to `slots`."""
    ranked = jnp.argsort(-_pooled(votes[..., 0], kept), axis=-1, stable=True)[..., :slots]
    chosen = jnp.arange(ranked.shape[-1])[None, None, :] < keep[:, None, None]
    at = jnp.sort(jnp.where(chosen, ranked, votes.shape[2]), axis=-1)
    return jnp.minimum(at, votes.shape[2] - 1)[..., None]


def _pooled(
    votes: Float[Array, "batch kv_heads slots"], kept: Int[Array, " batch"]
) -> Float[Array, "batch kv_heads slots"]:
    """Return by how much each token should stay; -inf for slots that hold none."""
    slot, kept = jnp.arange(votes.shape[-1])[None, None, :], kept[:, None, None]
    votes = jnp.where(slot < kept, votes, 0)
    window = (1, 1, _POOLED)
    pooled = jax.lax.reduce_window(votes, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")
    pooled = jnp.where(slot >= kept - LATEST, jnp.inf, pooled)
    return jnp.where(slot < kept, pooled, -jnp.inf)
