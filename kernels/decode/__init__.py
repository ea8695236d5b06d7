"""Attention of one new token per row over cached keys and values."""

from kernels.decode.api import decode_attention

__all__ = ["decode_attention"]
