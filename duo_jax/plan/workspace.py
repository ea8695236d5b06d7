"""What a step needs of a GPU's memory beside weights and caches: an estimate.

Read off the buffers that XLA lays out for an A100 (kernels.aot, jax 0.10.2). The peak of a chunk is
in its MLPs; per token, where s is the size of a number of the model's dtype:

    2 mlp s + 6 embed s          gate and up, whose product takes the place of one of them; the
                                 residual stream in float32, its norm, outputs not added yet
    9 mlp + 4 embed s            w8a8: gate and up as int32 sums, their product as int8

int4 weights add matrices of the MLP, dequantised. Queries, keys, values and outputs of attention
are fewer than that in all models served here.

A decode step has one matrix in another layout (model dtype), or q, k and v side by side (w8a8), or
partial sums of gate and up, and dequantised matrices for more than four rows (int4); next to
nothing with int8. All have logits.
"""

from duo_jax.config import ModelConfig
from duo_jax.quantised_weights import WeightFormat

_WIDE = 4  # bytes of float32 and int32
_MATRICES = 2  # of the MLP that are dequantised at a time
_INT4_GROUP = 128
_FEW_ROWS = 4  # up to which int4 is not dequantised (duo_jax.quantised_products)


def workspace_bytes(
    model: ModelConfig, *, chunk: int, batch_size: int, dtype: str, weights: WeightFormat
) -> int:
    """Return the workspace of a decode step or of the reading of a chunk, whichever is larger.

    Args:
      model: the model.
      chunk: tokens per row that are read at a time.
      batch_size: rows.
      dtype: of activations: bfloat16, float16 or float32.
      weights: format of the layers' projections.
    """
    itemsize = 4 if dtype == "float32" else 2
    sizes = {"batch_size": batch_size, "itemsize": itemsize, "weights": weights}
    return max(prefill_bytes(model, chunk=chunk, **sizes), decode_bytes(model, **sizes))


def prefill_bytes(
    model: ModelConfig, *, chunk: int, batch_size: int, itemsize: int, weights: WeightFormat
) -> int:
    """Return the workspace of reading a chunk."""
    embed, mlp = model.embed_size, model.mlp_size
    per_token = 2 * mlp * itemsize + 6 * embed * itemsize
    if weights == "w8a8":
        per_token = (2 * _WIDE + 1) * mlp + 4 * embed * itemsize
    dequantised = _MATRICES * embed * mlp * itemsize if weights == "int4" else 0
    return chunk * batch_size * per_token + dequantised


def decode_bytes(
    model: ModelConfig, *, batch_size: int, itemsize: int, weights: WeightFormat
) -> int:
    """Return the workspace of a decode step."""
    embed, mlp = model.embed_size, model.mlp_size
    q_size, kv_size = (h * model.head_dim for h in (model.num_q_heads, model.num_kv_heads))
    matrices = {
        "model": embed * q_size * itemsize,
        "int8": 0,
        "w8a8": embed * (q_size + 2 * kv_size),
        "int4": _MATRICES * _INT4_GROUP * mlp * _WIDE,
    }[weights]
    if weights == "int4" and batch_size > _FEW_ROWS:
        matrices = _MATRICES * embed * mlp * itemsize
    return matrices + batch_size * model.vocab_size * _WIDE
