"""Locks of outputs and work folders, which two processes must not write at once.

A lock is the operating system's, on a file of its own, so it ends with its process, however that
ends; a lock file that is left behind locks nothing.
"""

import contextlib
import errno
import os
import pathlib
from typing import TYPE_CHECKING

from duo_jax.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

# The file system has no locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def acquire(
    file: pathlib.Path, what: pathlib.Path, *, again: bool = False, wait: float = 0.0
) -> "FileLock | None":
    """Lock a file, which is made if it does not exist; the lock ends with the returned object.

    Args:
      file: the lock file; its folder exists.
      what: what it locks, for the message.
      again: whether this process may lock it several times.
      wait: seconds to wait for another process.

    Returns:
      The lock, or None where the file system has no locks.

    Raises:
      InputError: another process holds it.
      OSError: the file cannot be made.
    """
    from filelock import FileLock, Timeout  # 10 ms that a command without outputs need not pay

    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))  # or says why not
    lock = FileLock(file, is_singleton=again, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise InputError(f"{what} is in use by another process; wait until it has ended") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    return lock


def remove(lock: "FileLock | None") -> None:
    """End a lock that `acquire` has returned, and remove its file.

    The file goes while it is locked: who has opened it before, and locks it later, finds that it
    has no name any more, and begins again (filelock looks at st_nlink).
    """
    if lock is not None:
        with contextlib.suppress(OSError):
            pathlib.Path(lock.lock_file).unlink()
        lock.release()
