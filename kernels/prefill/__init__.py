"""Causal attention of a chunk of new tokens over cached keys and values, their own included."""

from kernels.prefill.api import prefill_attention

__all__ = ["prefill_attention"]
