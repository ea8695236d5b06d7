"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""

from duo_jax.api import DuoModel, load
from duo_jax.errors import InputError

__all__ = ["DuoModel", "InputError", "load"]
