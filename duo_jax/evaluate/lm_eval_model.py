"""The model "duo" for lm-evaluation-harness; importing this module registers it."""

from duo_jax.evaluate.harness.model import DuoLM

__all__ = ["DuoLM"]
