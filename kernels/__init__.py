"""The operations DuoAttention needs: masks and attention. Knows nothing of models."""

from kernels.attention import full_attention, streaming_attention

__all__ = ["full_attention", "streaming_attention"]
