"""Workspace of a step, beside weights and caches: an estimate.

The formulas are read off the buffers that XLA lays out for an A100 (kernels.aot, jax 0.10.2). A
chunk has its peak in the MLPs; per token, where s is the bytes of a number in the model's dtype:

    2 mlp s + 3 embed s    gate and up, whose product takes the place of one of them; the residual
                           stream, its norm, and what is added next
    9 mlp + 2 embed s      w8a8: gate and up as int32 sums, their product as int8; another embed s
                           where several GPUs share the MLP

(Two GPUs with weights in int8 or int4 take an eighth less.) Where the MLP is small, as its channels
are shared by many GPUs, or the cache is packed and the model small, the peak is in attention:

    embed (4 + 3 s)        the residual stream; queries and outputs, in float32 while they are
                           merged (within a fifth; measured for heads of 128)

beside the block that is unpacked of a packed cache (kernels.prefill.unpacked). int4 takes another
quarter of it, as its bytes are halved.

A decode step of one row holds, beside its logits:

    model dtype    a matrix in another layout
    w8a8           q, k and v side by side
    int4           partial sums of gate and up; from five rows on, a dequantised matrix
    int8           next to nothing
"""

import dataclasses

from duo_jax.cache import KVFormat
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_linear import FEW_ROWS
from duo_jax.model.quantised_weights import GROUP, WeightFormat
from kernels.prefill.unpacked import BLOCK_BYTES

_WIDE = 4  # bytes of float32 and int32


def workspace_bytes(
    architecture: ModelConfig,
    *,
    chunk: int,
    batch_size: int,
    dtype: str,
    weights: WeightFormat,
    kv: KVFormat = "model",
    cached: int = 0,
    devices: int = 1,
) -> int:
    """Return the workspace of a decode step or of the reading of a chunk, whichever is larger.

    Several GPUs share the channels of the MLP; each has the whole residual stream, and gathers the
    queries of retrieval heads, which together take up to a sixth less than is counted here.

    Args:
      architecture: the model.
      chunk: tokens per row that are read at a time.
      batch_size: rows.
      dtype: bfloat16, float16 or float32, of activations.
      weights: format of the layers' projections.
      kv: format of the caches.
      cached: numbers in the retrieval cache of a layer, the largest one, on a GPU.
      devices: GPUs that share the model.
    """
    architecture = dataclasses.replace(architecture, mlp_size=architecture.mlp_size // devices)
    itemsize = 4 if dtype == "float32" else 2
    sizes = {"batch_size": batch_size, "itemsize": itemsize, "weights": weights}
    unpacked = 0 if kv in ("model", "bf16") else min(cached * itemsize, BLOCK_BYTES)
    if kv == "int4":
        unpacked += unpacked // 4
    per_token = architecture.embed_size * (_WIDE + 3 * itemsize)  # beside what is unpacked
    return max(
        chunk * batch_size * mlp_token_bytes(architecture, itemsize, weights, shared=devices > 1),
        chunk * batch_size * per_token + unpacked,
        decode_bytes(architecture, **sizes),
    )


def mlp_token_bytes(
    architecture: ModelConfig, itemsize: int, weights: WeightFormat, *, shared: bool
) -> int:
    """Return the workspace that the MLPs take for a token of a chunk."""
    embed, mlp = architecture.embed_size * itemsize, architecture.mlp_size
    if weights == "w8a8":
        return (2 * _WIDE + 1) * mlp + (3 if shared else 2) * embed
    return 2 * mlp * itemsize + 3 * embed


def decode_bytes(
    architecture: ModelConfig, *, batch_size: int, itemsize: int, weights: WeightFormat
) -> int:
    """Return the workspace of a decode step."""
    embed, mlp = architecture.embed_size, architecture.mlp_size
    q_size, kv_size = (
        heads * architecture.head_dim
        for heads in (architecture.num_q_heads, architecture.num_kv_heads)
    )
    matrices = {
        "model": embed * q_size * itemsize if batch_size == 1 else 0,
        "int8": 0,
        "w8a8": embed * (q_size + 2 * kv_size),
        "int4": 2 * GROUP * mlp * _WIDE,
    }[weights]
    if weights == "int4" and batch_size > FEW_ROWS:
        matrices = embed * mlp * itemsize
    return matrices + batch_size * architecture.vocab_size * _WIDE
