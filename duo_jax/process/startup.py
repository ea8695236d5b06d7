"""The seconds of a command's start, in which Python imports jax and little else."""

import gc
import os

from duo_jax.process import signals


def begin() -> None:
    """Have signals end the process at once, and put the collection of garbage off.

    For the first line of what is the process's main module. Imports make no garbage, but so many
    objects that Python looks them all through several times: a fifth of the whole start.
    """
    signals.end_at_once()
    _open_streams()
    gc.disable()


def _open_streams() -> None:
    """Open those of the standard streams that are closed, as after `2>&-`, to nothing.

    The next file that is opened, such as a saved cache, would have the number of the stream, and
    what jaxlib logs to stderr would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the least free number


def end() -> None:
    """Collect garbage again, but not among what was imported, if `begin` has put that off."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
