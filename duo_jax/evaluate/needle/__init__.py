"""Needle in a haystack: one fact, hidden at every depth of texts of every length."""
