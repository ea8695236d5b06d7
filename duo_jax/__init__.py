"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from duo_jax.errors import InputError, check_packages

if TYPE_CHECKING:
    from duo_jax.api import DuoModel, load
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

check_packages()  # before an import that another package named `kernels` would break

try:
    __version__ = importlib.metadata.version("duo_jax")
except importlib.metadata.PackageNotFoundError:  # run from a clone
    __version__ = "0+not.installed"

# Imported when they are asked for: jax takes a second, and `duo-jax --help` does not need it.
_MODULES = {
    "Conversation": "session.conversation",
    "DuoConfig": "heads.split",
    "DuoModel": "api",
    "Pattern": "heads.pattern",
    "SamplingConfig": "serve.sampling",
    "load": "api",
    "load_pattern": "heads.pattern",
    "save_pattern": "heads.pattern",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
