"""The folder that keeps what may be lost: programs that were compiled, a model that was fetched."""

import os
import pathlib


def user_cache() -> pathlib.Path | None:
    """Return duo_jax's folder in the user's cache folder; None for a user without a home.

    It is where Hugging Face's libraries keep theirs, on every system.
    """
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(caches) if caches else pathlib.Path.home() / ".cache") / "duo_jax"
    except RuntimeError:
        return None
