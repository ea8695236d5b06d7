"""The least that a decode step must read and a prefill must multiply, counted from the shapes.

Decoding one token reads every weight once and every cached key and value once; nothing is shared
between the tokens of one row. Prefill multiplies every token with every weight, and every query
with the keys that it sees. Real programs do more, so a floor can only be approached. The ratio of
two floors, full to split, is what the split saves; the ratio of times comes out higher where the
saved part is the slower one per byte or operation, as attention is on a CPU.
"""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike

from duo_jax.cache import KVFormat
from duo_jax.checkpoints import tensor_names
from duo_jax.heads.split import DuoConfig
from duo_jax.plan import estimate
from duo_jax.plan.estimate import Estimate, Workload
from duo_jax.plan.settings import Setting


def decode_bytes(
    config: DuoConfig, *, context: int, dtype: DTypeLike, kv: KVFormat = "model"
) -> dict[str, int]:
    """Return the bytes that one step reads at `context` cached tokens: all, and its attention's."""
    counted = _estimate(config, jnp.dtype(dtype).name, kv)
    attention = counted.cache_read(context)
    return {"step": counted.weights_read + attention, "attention": attention}


@functools.cache
def _estimate(config: DuoConfig, dtype: str, kv: KVFormat) -> Estimate:
    return estimate.estimate(Workload(config=config, dtype=dtype), Setting(duo=True, kv=kv))


def prefill_flops(config: DuoConfig, *, length: int) -> dict[str, float]:
    """Count the operations of reading `length` tokens, 2 per multiply-add, in "exact" mode.

    "linear" are the projections of the layers. Attention counts visible (query, key) pairs only:
    i + 1 of them for query i of a retrieval head, at most ring_slots for a streaming head. The
    output projection runs once, after the last token, and counts in "all" only.
    """
    model, ring_slots = config.architecture, config.ring_slots
    weights = sum(
        tensor.size
        for tensor in tensor_names.tensors(model)
        if tensor.layer is not None and tensor.path[-1] == "kernel"
    )
    filling = min(length, ring_slots)
    streaming_pairs = filling * (filling + 1) // 2 + (length - filling) * ring_slots
    full_pairs = length * (length + 1) // 2
    pairs = sum(
        heads * full_pairs + (model.num_kv_heads - heads) * streaming_pairs
        for heads in config.retrieval_counts
    )
    per_pair = 4 * model.head_dim * model.q_per_kv  # q.k and p.v, of every query head of the group
    attention = float(per_pair * pairs)
    last = 2.0 * model.embed_size * model.vocab_size
    linear = 2.0 * length * weights
    return {"all": linear + attention + last, "linear": linear, "attention": attention}
