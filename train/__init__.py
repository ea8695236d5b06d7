"""Learning which KV heads are retrieval heads.

Part of duo_jax.
"""
