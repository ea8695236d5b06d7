"""Calls of ops with arrays that do not fit, and what is not refused with the right message."""

import dataclasses
import re

import jax.numpy as jnp

from kernels import (
    Past,
    decode_attention,
    full_attention,
    merge_lse,
    packed,
    prefill_attention,
    streaming_attention,
)
from kernels.packed import INT8

Q = jnp.ones((2, 20, 4, 16))
KV = jnp.ones((2, 20, 2, 16))  # of a whole sequence
CACHE = jnp.ones((2, 2, 20, 16))
ROWS = jnp.array([1, 2])
SIZES = {"sink_size": 4, "recent_size": 6}
SINKS, RECENTS = CACHE[:, :, :4], CACHE[:, :, :6]
PAST = Past(
    sink_keys=SINKS, sink_values=SINKS, recent_keys=RECENTS, recent_values=RECENTS, lengths=ROWS
)


def streaming(q=Q, k=KV, v=KV, **past):
    def call(**options):  # a type checker, if there is one, refuses such a past too
        changed = dataclasses.replace(PAST, **past) if past else None
        return streaming_attention(q, k, v, past=changed, **SIZES, **options)

    return call


def merging(outs, lses, *, softmax_scale, implementation):
    del softmax_scale  # it has none
    return merge_lse(outs, lses, implementation=implementation)


REFUSED = {
    "decode, fewer values than keys": (
        lambda **o: decode_attention(Q[:, 0], CACHE, CACHE[:, :, 1:], ROWS, **o),
        "do not fit",
    ),
    "decode, packed keys beside plain values": (
        lambda **o: decode_attention(Q[:, 0], packed.zeros(CACHE.shape, INT8), CACHE, ROWS, **o),
        "one is packed and the other is not",
    ),
    "decode, another batch": (
        lambda **o: decode_attention(Q[:1, 0], CACHE, CACHE, ROWS[:1], **o),
        "not fit",
    ),
    "decode, one length for two rows": (
        lambda **o: decode_attention(Q[:, 0], CACHE, CACHE, ROWS[:1], **o),
        r"lengths are int32 \(1,\), not 2 integers",
    ),
    "decode, lengths with a fraction": (
        lambda **o: decode_attention(Q[:, 0], CACHE, CACHE, ROWS / 2, **o),
        "lengths are float32",
    ),
    "decode, whole numbers": (
        lambda **o: decode_attention(
            Q[:, 0], CACHE.astype(jnp.int32), CACHE.astype(jnp.int32), ROWS, **o
        ),
        "keys are int32, not floating-point numbers",
    ),
    "full, booleans": (
        lambda **o: full_attention(Q, KV, KV.astype(bool), **o),
        "values are bool, not floating-point numbers",
    ),
    "streaming, whole numbers": (streaming(q=Q.astype(jnp.int32)), "queries are int32"),
    "merge, fewer logarithms": (
        lambda **o: merging(KV, KV[:, 1:, :, 0], **o),
        r"outputs \(2, 20, 2, 16\) and logarithms \(2, 19, 2\) do not fit",
    ),
    "merge, whole numbers": (
        lambda **o: merging(KV.astype(jnp.int32), KV[..., 0], **o),
        "outputs are int32",
    ),
    "prefill, 3 query heads": (
        lambda **o: prefill_attention(Q[:, :, :3], CACHE, CACHE, ROWS, **o),
        "3 query heads are not a multiple of 2 KV heads",
    ),
    "prefill, no tokens": (
        lambda **o: prefill_attention(Q[:, :0], CACHE, CACHE, ROWS, **o),
        "are empty",
    ),
    "full, fewer keys": (lambda **o: full_attention(Q, KV[:, 1:], KV[:, 1:], **o), "19 keys"),
    "streaming, fewer keys": (streaming(k=KV[:, 1:], v=KV[:, 1:]), "20 queries and 19 keys"),
    "streaming, another head_dim": (streaming(q=Q[..., :8]), "do not fit"),
    "streaming, a past with too few sinks": (
        streaming(sink_keys=SINKS[:, :, :3]),
        r"a past of \(2, 2, 3, 16\) does not fit: \(2, 2, 4, 16\) is needed",
    ),
    "streaming, a past of one head": (streaming(recent_keys=RECENTS[:, :1]), "does not fit"),
    "streaming, a past of one row": (streaming(lengths=ROWS[:1]), "past lengths"),
}


def refuses(call, message, error, implementation) -> bool:
    """Whether a call raises this error with this message."""
    try:
        call(softmax_scale=1.0, implementation=implementation)
    except error as raised:
        return re.search(message, str(raised)) is not None
    return False


def accepted() -> list[str]:
    """Return the calls that are not refused as they should be."""
    found = [
        f"{name} ({implementation})"
        for name, (call, message) in REFUSED.items()
        for implementation in ("auto", "xla", "interpret")
        if not refuses(call, message, ValueError, implementation)
    ]
    half = {name: x.astype(jnp.float16) for name, x in vars(PAST).items() if name != "lengths"}
    message = "float32, keys and values float16"
    if not refuses(streaming(**half), message, NotImplementedError, "interpret"):
        found.append("a past of another dtype")
    return found
