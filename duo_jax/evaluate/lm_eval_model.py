"""The model "duo_jax" for lm-evaluation-harness; importing this module registers it."""

from duo_jax.evaluate.harness.model import DuoLM

__all__ = ["DuoLM"]
