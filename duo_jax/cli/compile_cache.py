"""Compiled programs are kept from one run of a command to the next: jax's persistent cache.

jax writes and reads entries under a lock, so that processes may share the folder, and throws out
what was not used for longest. An entry is its program, then the time of its latest use in a second
file; a process that is killed in between leaves an entry that jax would find damaged again and
again, so entries that lack one of the two are removed first. Programs are packed with a checksum,
which jax leaves out but checks where there is one: what is damaged is compiled again, and removed,
as jax would leave it in the place of the new program for ever.
"""

import contextlib
import os
import pathlib
import sys
import warnings
from typing import Any

import jax
import zstandard
from jax._src import compilation_cache

from duo_jax.cli.user_cache import user_cache
from duo_jax.errors import InputError
from duo_jax.process import locks

OFF = "--no-compile-cache"
HELP = f"""\
Compiled programs are kept in the user's cache folder for the next run, unless {OFF} is given.
"""
VARIABLE = "DUO_JAX_COMPILE_CACHE"  # another folder, or "off"

_MOST_BYTES = 2**30
# Programs that compile faster are not kept: reading them would save little.
_LEAST_SECONDS = 0.1
_LOCK = ".lockfile"  # jax's own
_WAIT = 10.0  # seconds for the lock, as jax waits
_PROGRAM, _USED = "-cache", "-atime"  # the two files of an entry
_jax_reads = compilation_cache.get_executable_and_time


def folder() -> pathlib.Path | None:
    """Return where programs are kept; None: nowhere."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return pathlib.Path(chosen)
    own = user_cache()
    return None if own is None else own / "programs"


def switch_on() -> None:
    """Let jax keep this process's programs, unless its user has told jax where to keep them.

    A folder that cannot be used costs a line on standard error, and time.
    """
    place = folder()
    if place is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        locked = _tidy(place)
        str(place).encode()  # jax takes no other names
    except (OSError, UnicodeEncodeError) as error:
        locked, reason = False, getattr(error, "strerror", "no UTF-8")
        print(f"{place} cannot be used ({reason}): programs are not kept", file=sys.stderr)
    if not locked:
        return
    # What jax cannot read or write in the middle of a run, it compiles.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")
    compilation_cache.compress_executable = _compress
    compilation_cache.get_executable_and_time = _read
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _compress(program: bytes) -> bytes:
    """Do what jax's function of this name does, with a checksum in the frame."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(program)


def _read(key: str, *args: Any, **options: Any) -> Any:
    """Do what jax's get_executable_and_time does; an entry that is damaged is removed."""
    try:
        return _jax_reads(key, *args, **options)
    except OSError:
        raise
    except Exception:  # of zstandard, or of jaxlib for a program of another kind
        entry = pathlib.Path(jax.config.values["jax_compilation_cache_dir"]) / key
        for file in (_PROGRAM, _USED):
            with contextlib.suppress(OSError):
                entry.with_name(entry.name + file).unlink()
        raise


def _tidy(place: pathlib.Path) -> bool:
    """Remove entries that were not written to their end; return whether the folder has locks."""
    try:
        lock = locks.acquire(place / _LOCK, place, wait=_WAIT)
    except InputError:  # others are at work; they have tidied
        return True
    if lock is None:
        return False
    try:
        names = {file.name for file in place.iterdir()}
        for mine, other in ((_PROGRAM, _USED), (_USED, _PROGRAM)):
            for name in names:
                if name.endswith(mine) and name.removesuffix(mine) + other not in names:
                    (place / name).unlink(missing_ok=True)
    finally:
        lock.release()
    return True
