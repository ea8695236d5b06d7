"""The seconds of a command's start, in which Python imports jax and little else."""

import gc

from duo_jax.process import signals


def begin() -> None:
    """Have signals end the process at once, and put the collection of garbage off.

    For the first line of what is the process's main module. Imports make no garbage, but so many
    objects that Python looks them all through several times: a fifth of the whole start.
    """
    signals.end_at_once()
    gc.disable()


def end() -> None:
    """Collect garbage again, but not among what was imported, if `begin` has put that off."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
