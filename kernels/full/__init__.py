"""Causal attention of whole sequences, for training and for models without a cache."""

from kernels.full.api import full_attention

__all__ = ["full_attention"]
