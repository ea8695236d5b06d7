"""Attention of streaming heads over whole sequences or chunks."""

import functools

from jaxtyping import Array, Float

from kernels import compat, limits
from kernels.by_heads import by_heads
from kernels.dispatch import Implementation, dispatch
from kernels.mosaic import gradient
from kernels.mosaic import tiles as mosaic_tiles
from kernels.no_gradient import refuse_gradient
from kernels.streaming import mosaic, triton, xla
from kernels.streaming.heuristic import choose_tiles
from kernels.streaming.options import StreamingOptions
from kernels.streaming.past import Past
from kernels.tiles import ForwardBackwardTiles


def streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    past: Past | None = None,
    implementation: Implementation = "auto",
    tiles: ForwardBackwardTiles | None = None,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    """Attend with the streaming mask: token i sees the sinks and its `recent_size` latest tokens.

    O(length * (sink_size + recent_size)) work; blocks of keys that no query sees are not loaded.
    Differentiable, with memory that grows linearly with the length; the kernels only without
    `past`, once and in reverse mode (jax refuses forward mode with a TypeError). Query head i reads
    KV head i // group.

    Args:
      q: queries, already rotated.
      k: keys, already rotated.
      v: values.
      sink_size: first tokens of the sequence that every query sees; 0 or more.
      recent_size: latest tokens that a query sees, its own included; at least 1.
      softmax_scale: factor on the scores.
      past: the cached tokens before the chunk; its sinks must include those of the chunk's own
        tokens that are sinks. Default: the chunk begins the sequence.
      implementation: see kernels.dispatch.
      tiles: tile sizes of the kernels; the XLA version has its own. Default: chosen from the shapes
        and the GPU.

    Returns:
      The output in the dtype of `q`, and its lse (natural logarithm, float32; float64 for float64),
      which is not differentiable.

    Raises:
      UnsupportedError: the named implementation cannot run this case, or is asked for a gradient
        that its kernels do not have; or an array is larger than kernels can address ("auto" too,
        see kernels.dispatch), such as the gradient's sums over many sinks. The message says why.
      ValueError: the arrays or the past do not fit one another, or a size is impossible.
    """
    if sink_size < 0 or recent_size < 1:
        raise ValueError(f"{sink_size=} must be at least 0 and {recent_size=} at least 1")
    limits.check_sequences(q, k, v)
    if past is None:
        recent_size = min(recent_size, q.shape[1])  # a longer window is the same, and may overflow
    else:
        past.check(k, sink_size=sink_size)
    some_heads = functools.partial(
        _streaming_attention,
        sink_size=sink_size,
        recent_size=recent_size,
        softmax_scale=softmax_scale,
        past=past,
        implementation=implementation,
        tiles=tiles,
    )
    if past is not None:
        return some_heads(q, k, v)
    return by_heads(some_heads, q, k, v, axes=(2, 2, 2), kv_heads=k.shape[2])


def _streaming_attention(
    q: Float[Array, "batch length q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    sink_size: int,
    recent_size: int,
    softmax_scale: float,
    past: Past | None,
    implementation: Implementation,
    tiles: ForwardBackwardTiles | None,
) -> tuple[Float[Array, "batch length q_heads head_dim"], Float[Array, "batch length q_heads"]]:
    sizes = {"sink_size": sink_size, "recent_size": recent_size, "softmax_scale": softmax_scale}

    def by_triton(q, k, v, interpret: bool = False):
        chosen = tiles or choose_tiles(
            length=q.shape[1], head_dim=q.shape[3], dtype=q.dtype, gpu=compat.tile_gpu()
        )
        options = StreamingOptions(**sizes, tiles=chosen, interpret=interpret)
        if past is None:
            return triton.whole_sequence(options, q, k, v)
        return triton.after(past, options, q, k, v)

    def run_mosaic(interpret: bool):
        chosen = tiles or mosaic_tiles.for_sequence(
            length=q.shape[1], head_dim=q.shape[3], window=recent_size
        )
        options = StreamingOptions(**sizes, tiles=chosen, interpret=interpret)
        kernel = functools.partial(mosaic.streaming_attention, options=options)
        kernel = refuse_gradient(kernel, gradient.NO_GRADIENT)
        if past is not None:
            return kernel(q, k, v, past)
        if implementation == "auto":
            by_xla = functools.partial(xla.streaming_attention, **sizes)
            kernel = gradient.for_auto(kernel, triton=by_triton, xla=by_xla)
        return kernel(q, k, v)

    return dispatch(
        implementation,
        op="streaming",
        xla=lambda: xla.streaming_attention(q, k, v, past=past, **sizes),
        triton=functools.partial(by_triton, q, k, v),
        refusal=limits.refusal(q, k, v, *(past.buffers() if past is not None else ())),
        mosaic=run_mosaic,
        mosaic_refusal=limits.mosaic_refusal(q),
    )
