"""Accuracy: published numbers, and the report of the ablations."""
