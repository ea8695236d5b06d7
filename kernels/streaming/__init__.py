"""Attention of streaming heads over whole sequences or chunks."""

from kernels.streaming.api import streaming_attention
from kernels.streaming.past import Past

__all__ = ["Past", "streaming_attention"]
