"""Weights in files: Hugging Face folders and converted checkpoints, without torch."""
