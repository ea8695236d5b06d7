"""The least that a decode step must read and a prefill must multiply, counted from the shapes.

Decoding one token reads every weight once and every cached key and value once; nothing is shared
between the tokens of one row. Prefill multiplies every token with every weight, and every query
with the keys that it sees. Real programs do more, so a floor can only be approached. The ratio of
two floors, full to split, is what the split saves; the ratio of times comes out higher where the
saved part is the slower one per byte or operation, as attention is on a CPU.
"""

from collections.abc import Sequence

from duo_jax.checkpoints import tensor_names
from duo_jax.model.config import ModelConfig


def weight_bytes(model: ModelConfig, *, itemsize: int) -> int:
    """Return the bytes of all weights that one decode step reads: one row of the embedding."""
    read = sum(
        model.embed_size if tensor.name == "model.embed_tokens.weight" else tensor.size
        for tensor in tensor_names.tensors(model)
    )
    if model.tie_embeddings:  # the table is then the output projection as well
        read += model.vocab_size * model.embed_size
    return itemsize * read


def kv_bytes(
    model: ModelConfig,
    retrieval_counts: Sequence[int],
    *,
    retrieval_tokens: int,
    streaming_tokens: int,
    itemsize: int,
) -> int:
    """Return the bytes of keys and values of one row.

    Args:
      model: the model.
      retrieval_counts: KV heads with a full cache, per layer.
      retrieval_tokens: tokens that each of them holds.
      streaming_tokens: tokens that each of the others holds.
      itemsize: bytes of a value.
    """
    tokens = sum(
        heads * retrieval_tokens + (model.num_kv_heads - heads) * streaming_tokens
        for heads in retrieval_counts
    )
    return 2 * itemsize * model.head_dim * tokens


def decode_bytes(
    model: ModelConfig,
    retrieval_counts: Sequence[int],
    *,
    context: int,
    ring_slots: int,
    itemsize: int,
) -> dict[str, int]:
    """Return the bytes that one step reads at `context` cached tokens: all, and its attention's."""
    attention = kv_bytes(
        model,
        retrieval_counts,
        retrieval_tokens=context,
        streaming_tokens=min(context, ring_slots),
        itemsize=itemsize,
    )
    return {
        "step": weight_bytes(model, itemsize=itemsize) + attention,
        "attention": attention,
    }


def prefill_flops(
    model: ModelConfig,
    retrieval_counts: Sequence[int],
    *,
    length: int,
    sink_size: int,
    recent_size: int,
) -> dict[str, float]:
    """Count the operations of reading `length` tokens, 2 per multiply-add, in "exact" mode.

    Attention counts visible (query, key) pairs only: i + 1 of them for query i of a retrieval head,
    at most sink_size + recent_size for a streaming head. The output projection runs once, after the
    last token.
    """
    linear = sum(
        tensor.size
        for tensor in tensor_names.tensors(model)
        if tensor.layer is not None and tensor.path[-1] == "kernel"
    )
    ring_slots = sink_size + recent_size
    filling = min(length, ring_slots)
    streaming_pairs = filling * (filling + 1) // 2 + (length - filling) * ring_slots
    full_pairs = length * (length + 1) // 2
    pairs = sum(
        heads * full_pairs + (model.num_kv_heads - heads) * streaming_pairs
        for heads in retrieval_counts
    )
    per_pair = 4 * model.head_dim * model.q_per_kv  # q.k and p.v, of every query head of the group
    attention = float(per_pair * pairs)
    last = 2.0 * model.embed_size * model.vocab_size
    return {"all": 2.0 * length * linear + attention + last, "attention": attention}
