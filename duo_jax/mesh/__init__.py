"""Several devices that serve one model, or find its retrieval heads, as one.

A mesh has two axes. "model" shares the weights, and the text of full caches; "data" shares the rows
of a batch. XLA splits the products of weights by itself, from where their numbers lie.
"""
