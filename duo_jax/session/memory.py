"""Memory for a cache: too little of it is the fault of the lengths that were asked for."""

import contextlib
import os
from collections.abc import Iterator

import jax

from duo_jax.errors import InputError


@contextlib.contextmanager
def for_cache(size: int) -> Iterator[None]:
    """Turn the failure of a block that allocates a cache of `size` bytes into an InputError.

    Raises:
      InputError: the device has less memory, or less is free.
    """
    memory = device_memory()
    if memory is not None and size > memory:  # Linux promises more than there is, and kills later
        raise InputError(
            f"the cache would take {size / 1e9:,.1f} GB, and there are {memory / 1e9:,.1f} GB of "
            "memory: fewer tokens, rows or recent tokens are needed"
        )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the cache would take {size / 1e9:,.1f} GB, and less memory is free"
        ) from None


def device_memory() -> int | None:
    """Return the bytes of memory of the device on which caches lie; None where it does not say."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
