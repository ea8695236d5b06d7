"""The operations of DuoAttention: masks and attention. Nothing here knows of models.

Part of duo_jax.
"""

from kernels.decode import decode_attention
from kernels.dispatch import Implementation
from kernels.full import full_attention
from kernels.merge import merge_lse
from kernels.prefill import prefill_attention
from kernels.streaming import Past, streaming_attention

__all__ = [
    "Implementation",
    "Past",
    "decode_attention",
    "full_attention",
    "merge_lse",
    "prefill_attention",
    "streaming_attention",
]
