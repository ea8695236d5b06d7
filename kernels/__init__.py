"""The operations DuoAttention needs: masks and attention. Knows nothing of models."""

from kernels.attention import full_attention
from kernels.decode import decode
from kernels.prefill import prefill
from kernels.streaming import Past, streaming_attention

__all__ = ["Past", "decode", "full_attention", "prefill", "streaming_attention"]
