"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""

import importlib.metadata

from duo_jax.api import DuoModel, load
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern, load_pattern, save_pattern
from duo_jax.heads.split import DuoConfig
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.conversation import Conversation

__all__ = [
    "Conversation",
    "DuoConfig",
    "DuoModel",
    "InputError",
    "Pattern",
    "SamplingConfig",
    "__version__",
    "load",
    "load_pattern",
    "save_pattern",
]

try:
    __version__ = importlib.metadata.version("duo_jax")
except importlib.metadata.PackageNotFoundError:  # run from a clone
    __version__ = "0+not.installed"
