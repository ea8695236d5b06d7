"""What a step needs of a GPU's memory beside weights and caches: an estimate.

Read off the buffers that XLA lays out for an A100 (kernels.aot, jax 0.10.2). The peak of a chunk is
in its MLPs; per token, where s is the size of a number of the model's dtype:

    2 mlp s + embed (4 + 4 s)    gate and up, whose product takes the place of one of them; the
                                 residual stream in float32, its norm, outputs not added yet
    9 mlp + 4 embed s            w8a8: gate and up as int32 sums, their product as int8

int4 weights add a matrix of the MLP, dequantised. Queries, keys, values and outputs of attention
are fewer than all that in the models served here. Fewer than four layers may take up to one
embed s more: XLA then adds up outputs later.

A decode step of one row has a matrix in another layout (model dtype), or q, k and v side by side
(w8a8), or partial sums of gate and up, and a dequantised matrix from five rows on (int4); with int8
next to nothing. All have logits.
"""

from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import WeightFormat

_WIDE = 4  # bytes of float32 and int32
_INT4_GROUP = 128  # inputs whose partial sums have a place of their own
_FEW_ROWS = 4  # up to which int4 is not dequantised (duo_jax.model.quantised_linear)


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
    per_token = 2 * mlp * itemsize + embed * (_WIDE + 4 * itemsize)
    if weights == "w8a8":
        per_token = (2 * _WIDE + 1) * mlp + 4 * embed * itemsize
    dequantised = embed * mlp * itemsize if weights == "int4" else 0
    return chunk * batch_size * per_token + dequantised


def decode_bytes(
    model: ModelConfig, *, batch_size: int, itemsize: int, weights: WeightFormat
) -> int:
    """Return the workspace of a decode step."""
    embed, mlp = model.embed_size, model.mlp_size
    q_size, kv_size = (h * model.head_dim for h in (model.num_q_heads, model.num_kv_heads))
    matrices = {
        "model": embed * q_size * itemsize if batch_size == 1 else 0,
        "int8": 0,
        "w8a8": embed * (q_size + 2 * kv_size),
        "int4": 2 * _INT4_GROUP * mlp * _WIDE,
    }[weights]
    if weights == "int4" and batch_size > _FEW_ROWS:
        matrices = embed * mlp * itemsize
    return matrices + batch_size * model.vocab_size * _WIDE
