"""The operations DuoAttention needs: masks and attention. Knows nothing of models.

Part of duo_jax.
"""

from kernels.decode import decode
from kernels.dispatch import Implementation
from kernels.full import full_attention
from kernels.merge import merge_lse
from kernels.prefill import prefill
from kernels.streaming import Past, streaming_attention

__all__ = [
    "Implementation",
    "Past",
    "decode",
    "full_attention",
    "merge_lse",
    "prefill",
    "streaming_attention",
]
