"""Hugging Face weights in and out, without torch.

Part of duo_jax.
"""
