"""Attention over parts of the keys, merged into attention over all of them."""

from kernels.merge.api import merge_lse

__all__ = ["merge_lse"]
