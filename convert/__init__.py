"""Hugging Face weights in and out, without torch."""
