"""Texts that grow: prompts, conversations, saved caches."""
