"""The operations DuoAttention needs: masks and attention. Knows nothing of models."""

from kernels.attention import Past, full_attention, streaming_attention
from kernels.decode import decode
from kernels.prefill import prefill

__all__ = ["Past", "decode", "full_attention", "prefill", "streaming_attention"]
