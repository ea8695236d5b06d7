"""Convert models between Hugging Face folders and checkpoints of duo_jax, without torch.

Part of duo_jax.
"""
