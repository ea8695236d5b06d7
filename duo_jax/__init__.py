"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""

from duo_jax.errors import InputError
from duo_jax.model import DuoModel, load

__all__ = ["DuoModel", "InputError", "load"]
