"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""

import importlib.metadata

from duo_jax.errors import InputError, check_packages

check_packages()  # before the imports that another package named `kernels` would break

from duo_jax.api import DuoModel, load  # noqa: E402
from duo_jax.heads.pattern import Pattern, load_pattern, save_pattern  # noqa: E402
from duo_jax.heads.split import DuoConfig  # noqa: E402
from duo_jax.serve.sampling import SamplingConfig  # noqa: E402
from duo_jax.session.conversation import Conversation  # noqa: E402

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
