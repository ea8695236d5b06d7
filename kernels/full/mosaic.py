"""Full attention of whole sequences, for Hopper: the prefill that reads the sequence as its cache.

kernels.prefill.mosaic has the kernel, and its sizes. It has no gradient.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.mosaic import source, work
from kernels.prefill import mosaic as prefill
from kernels.tiles import AttentionTiles


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
    tiles: AttentionTiles,
    interpret: bool,
) -> Float[Array, "batch length q_heads head_dim"]:
    """See kernels.full_attention."""
    plan = functools.partial(
        prefill.plan_causal,
        tile_of=source.in_sequence,
        group=q.shape[2] // k.shape[2],
        paged=False,
        length=q.shape[1],
        slots=q.shape[1],
        tiles=tiles,
    )
    k, v = (work.aligned(x, axis=1) for x in (k, v))
    out, _ = prefill.attend(
        plan,
        q,
        (k, v),
        (jnp.zeros(q.shape[0], jnp.int32), k, v),
        name="duo_full_mosaic",
        softmax_scale=softmax_scale,
        tiles=tiles,
        interpret=interpret,
    )
    return out
