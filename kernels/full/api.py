"""Causal attention of whole sequences, for training and for models without a cache."""

import functools

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.by_heads import by_heads
from kernels.dispatch import Implementation, dispatch
from kernels.full import mosaic, triton, xla
from kernels.full.heuristic import choose_tiles
from kernels.mosaic import gradient
from kernels.mosaic import tiles as mosaic_tiles
from kernels.no_gradient import refuse_gradient
from kernels.streaming.options import StreamingOptions
from kernels.tiles import ForwardBackwardTiles


def full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
    implementation: Implementation = "auto",
    tiles: ForwardBackwardTiles | None = None,
) -> Float[Array, "batch length q_heads head_dim"]:
    """Attend causally: token i sees tokens 0..i.

        out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s] + mask[t, s]) v[s]

    Differentiable, with memory that grows linearly with the length; the kernels once, in reverse
    mode (jax refuses forward mode with a TypeError). Query head i reads KV head i // group.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      softmax_scale: factor on the scores, usually head_dim ** -0.5.
      implementation: see kernels.dispatch.
      tiles: tile sizes of the kernels; the XLA version has its own. Default: chosen from the shapes
        and the GPU.

    Returns:
      The output in the dtype of `q`.

    Raises:
      UnsupportedError: the named implementation cannot run this case, or is asked for a second
        derivative that its kernels do not have; or an array is larger than kernels can address
        ("auto" too, see kernels.dispatch). The message says why.
      ValueError: the arrays do not fit one another.
    """
    limits.check_sequences(q, k, v)
    some_heads = functools.partial(
        _full_attention, softmax_scale=softmax_scale, implementation=implementation, tiles=tiles
    )
    return by_heads(some_heads, q, k, v, axes=(2, 2, 2), kv_heads=k.shape[2])


def _full_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    softmax_scale: float,
    implementation: Implementation,
    tiles: ForwardBackwardTiles | None,
) -> Float[Array, "batch length q_heads head_dim"]:
    def by_triton(q, k, v, interpret: bool = False):
        options = StreamingOptions(
            sink_size=0,
            recent_size=q.shape[1],
            softmax_scale=softmax_scale,
            tiles=tiles
            or choose_tiles(
                length=q.shape[1], head_dim=q.shape[3], dtype=q.dtype, gpu=compat.tile_gpu()
            ),
            interpret=interpret,
        )
        return triton.full_attention(options, q, k, v)

    def run_mosaic(interpret: bool):
        chosen = tiles or mosaic_tiles.for_sequence(length=q.shape[1], head_dim=q.shape[3])
        sizes = {"softmax_scale": softmax_scale, "tiles": chosen.forward, "interpret": interpret}
        kernel = functools.partial(mosaic.full_attention, **sizes)
        kernel = refuse_gradient(kernel, gradient.NO_GRADIENT)
        if implementation == "auto":
            by_xla = functools.partial(xla.full_attention, softmax_scale=softmax_scale)
            kernel = gradient.for_auto(kernel, triton=by_triton, xla=by_xla)
        return kernel(q, k, v)

    return dispatch(
        implementation,
        op="full",
        xla=lambda: xla.full_attention(q, k, v, softmax_scale=softmax_scale),
        triton=functools.partial(by_triton, q, k, v),
        refusal=limits.refusal(q, k, v),
        mosaic=run_mosaic,
        mosaic_refusal=limits.mosaic_refusal(q),
    )
