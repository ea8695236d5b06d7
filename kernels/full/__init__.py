"""Causal attention of whole sequences: what training and plain models use."""

from kernels.full.api import full_attention

__all__ = ["full_attention"]
