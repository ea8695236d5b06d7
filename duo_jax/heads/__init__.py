"""Retrieval heads: pattern files, the choice of heads, parameters reordered to put them first."""
