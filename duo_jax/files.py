"""The user's files: read and written with one clear line for what cannot be.

What the operating system refuses for a path that the user named (a missing file, no permission, a
full disk, a name that is too long) becomes an InputError here. An OSError from anywhere else is a
defect of ours, and shows a traceback. Outputs appear under their names only when they are complete.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from typing import IO, Any

from duo_jax.errors import InputError, cut, quoted
from duo_jax.process import locks, signals

_LONGEST_SHOWN = 200  # characters of a path in a message
LARGEST_TEXT = 3 << 24  # bytes, or characters of 4; a text of 4M tokens has about 20 MB
_LONGEST_WAIT = 10.0  # seconds for another process to write a file of the same name
# What a disk or its permissions refuse, wherever in a block of code it happens.
_REFUSALS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
)
# tensorstore and safetensors raise errors of their own that only quote the system's.
_QUOTED_ERRNO = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


def exists(path: str | pathlib.Path) -> bool:
    """Whether there is anything of this name, links followed.

    Raises:
      InputError: the system does not say, such as for a name that is too long.
    """
    return _mode(path) != 0


def is_file(path: str | pathlib.Path) -> bool:
    """Whether there is a file of this name.

    Raises:
      InputError: the system does not say, such as for a name that is too long.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | pathlib.Path) -> bool:
    """Whether there is a folder of this name.

    Raises:
      InputError: the system does not say, such as for a name that is too long.
    """
    return stat.S_ISDIR(_mode(path))


def absolute(path: str | pathlib.Path) -> pathlib.Path:
    """Return a path from the root.

    Raises:
      InputError: it begins at the current folder, which was removed.
    """
    try:
        return pathlib.Path(path).absolute()
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: the current folder was removed") from None


@contextlib.contextmanager
def reading(path: str | pathlib.Path) -> Iterator[None]:
    """Turn errors of a block that only reads `path` into an InputError about it.

    Raises:
      InputError: it cannot be read, or is not UTF-8.
    """
    try:
        yield
    except UnicodeError:
        raise InputError(f"{shown(path)} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[None]:
    """Turn errors of a block that only writes `path` into an InputError about it.

    Raises:
      InputError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        code = _errno(error)
        if code is None:
            raise
        raise _cannot_be_written(path, code) from None


def present(path: str | pathlib.Path) -> bool:
    """Whether there is a file of this name, which may be missing, but not be something else.

    Raises:
      InputError: it is a folder, a pipe or a device, or the system does not say.
    """
    mode = _mode(path)
    if mode and not stat.S_ISREG(mode):
        raise InputError(f"{shown(path)} cannot be read: it is {_kind(mode)}, no file")
    return mode != 0


def check_folder(path: str | pathlib.Path) -> None:
    """Refuse a folder for a library to read that holds something else than files and folders.

    It would wait for a pipe without an end.

    Raises:
      InputError: there is a pipe or a device in it.
    """
    for place, _, names in os.walk(path):
        for name in names:
            present(pathlib.Path(place, name))


def open_binary(path: str | pathlib.Path, *, pipes: bool = False) -> IO[bytes]:
    """Open a file to read; meant for a block of `reading`.

    Args:
      path: the file.
      pipes: it may be something else, such as /dev/stdin. In a folder that somebody published, a
        pipe would be waited for without an end, and a device has none.

    Raises:
      InputError: it is a folder, a pipe or a device.
      OSError: it cannot be opened.
    """
    check_name(path)
    if not pipes:
        present(path)
    return pathlib.Path(path).open("rb")


def check_name(path: str | pathlib.Path) -> None:
    """Refuse a name that no file can have, at which Python raises other errors than the system's.

    Raises:
      InputError: it holds a null character, or half of a character.
    """
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise InputError(f"{quoted(str(path))} holds characters that no file's name can hold")


def read_text(
    path: str | pathlib.Path, *, max_bytes: int = LARGEST_TEXT, pipes: bool = False
) -> str:
    """Read a UTF-8 text file.

    Args:
      path: the file.
      max_bytes: of its content.
      pipes: as in `open_binary`.

    Raises:
      InputError: it cannot be read, has more than `max_bytes`, or is not UTF-8.
    """
    with reading(path):
        with open_binary(path, pipes=pipes) as file:
            content = file.read(max_bytes + 1)  # devices have no size to look at
        if len(content) > max_bytes:
            raise InputError(f"{shown(path)} has more than {max_bytes:,} bytes")
        # Line ends as Python's text mode reads them.
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def make_folder(path: str | pathlib.Path) -> None:
    """Make a folder and its parents, where they do not exist.

    Raises:
      InputError: it cannot be made.
    """
    check_name(path)
    with writing(path):
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def check_holds_only(path: str | pathlib.Path, names: Collection[str], otherwise: str) -> None:
    """Refuse to replace a folder that holds something else, such as somebody's model.

    Args:
      path: the folder; need not exist.
      names: what it may hold.
      otherwise: what is said after the folder's name.

    Raises:
      InputError: it holds another name, or cannot be read.
    """
    if is_folder(path):
        with reading(path):
            others = {file.name for file in pathlib.Path(path).iterdir()} - set(names)
        if others:
            raise InputError(f"{path} {otherwise}")


@contextlib.contextmanager
def new_folder(
    path: str | pathlib.Path, *, replace: bool = False, wait: float = 0.0
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder beside `path` that takes its name when the block succeeds.

    Signals interrupt only the block, and neither the exchange nor the removal of what is left.

    Args:
      path: the folder to make; its parents are made too.
      replace: overwrite an existing folder; otherwise it must not exist or be empty.
      wait: seconds to wait for another process that writes it.

    Raises:
      InputError: `path` exists (and `replace` is false), another process is writing it, or it
        cannot be written, by the block either.
    """
    check_name(path)
    path = pathlib.Path(path)
    mode = _mode(path)
    if mode and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a file; an output folder is needed")
    if not path.name:
        raise InputError(f"{path} cannot be written: an output folder needs a name")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with signals.put_off(), _alone(path, wait=wait) as partial:
        with writing(path):
            _put_back(path)
            if not replace and path.is_dir() and any(path.iterdir()):
                raise InputError(f"{path} already exists; remove it or choose another name")
            partial.mkdir()
            mode = mode or partial.stat().st_mode  # what the umask leaves
            partial.chmod(0o700)
        try:
            with signals.let_through():
                yield partial
        except Exception as error:
            code = _errno(error)
            if code not in _REFUSALS:  # such as a file that the block expects and does not find
                raise
            raise _cannot_be_written(path, code) from None
        with writing(path):
            _share(partial, stat.S_IMODE(mode))
            _take_place(partial, path)


def check_file(path: str | pathlib.Path) -> None:
    """Refuse a name under which no file can be written, before hours are spent on its content.

    Raises:
      InputError: it is the name of a folder, pipe or device, or of a file in a folder which does
        not exist, or which takes no file.
    """
    _check_file_name(path)
    check_place(path)


def check_new_folder(path: str | pathlib.Path) -> None:
    """Refuse a folder that could not be made, before hours are spent on its content.

    Raises:
      InputError: it exists, or cannot be made.
    """
    if exists(path):
        raise InputError(f"{shown(path)} already exists; remove it or choose another name")
    check_place(path)


def check_place(path: str | pathlib.Path) -> None:
    """Refuse a place where nothing can be made: tried, as what the system says is not always so.

    Root may write in /proc, and everybody on a full disk, if one asks for permissions only.

    Raises:
      InputError: no file can have the name, or the nearest of its folders that exists takes no
        file, or is none.
    """
    check_name(path)
    parent = next(parent for parent in absolute(path).parents if exists(parent))
    if not is_folder(parent):
        raise InputError(f"{shown(path)} cannot be written: {parent} is not a folder")
    prefix = f".{pathlib.Path(path).name}."
    with writing(path), tempfile.TemporaryDirectory(prefix=prefix, dir=parent):
        pass


def _check_file_name(path: str | pathlib.Path) -> None:
    mode = _mode(path)  # "" is the current folder
    if mode and not stat.S_ISREG(mode):  # a file would take the place of /dev/null, for everybody
        raise InputError(f"{shown(path)} cannot be written: it is {_kind(mode)}; name a file")
    if not is_folder(absolute(path).parent):
        raise InputError(f"{shown(path)} cannot be written: its folder does not exist")


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
      InputError: it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | pathlib.Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
      InputError: it cannot be written.
    """
    check_name(path)
    _check_file_name(path)
    path = pathlib.Path(os.path.realpath(path) if os.path.islink(path) else path)
    with signals.put_off(), _alone(path, wait=_LONGEST_WAIT) as partial, writing(path):
        partial.write_bytes(content)
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)


def append_text(path: str | pathlib.Path, text: str) -> None:
    """Add text to the end of a file, which is made if it does not exist: all of it or nothing.

    Raises:
      InputError: it cannot be written.
    """
    check_name(path)
    content = text.encode()
    with signals.put_off(), writing(path), pathlib.Path(path).open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def _mode(path: str | pathlib.Path) -> int:
    """Return the mode of what is there, links followed; 0 if there is nothing."""
    with reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: as in check_name
            return 0


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def shown(path: str | pathlib.Path) -> str:
    """Return a path for a message, cut where it is very long."""
    return cut(str(path), _LONGEST_SHOWN)


def _errno(error: Exception) -> int | None:
    """Return the system's error number, where an error has one or quotes it."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, InputError):
        return None
    quoted = _QUOTED_ERRNO.search(str(error))
    return int(quoted[1] or quoted[2]) if quoted else None


def _cannot_be_written(path: str | pathlib.Path, code: int) -> InputError:
    return InputError(f"{shown(path)} cannot be written: {os.strerror(code)}")


@contextlib.contextmanager
def _alone(path: pathlib.Path, *, wait: float = 0.0) -> Iterator[pathlib.Path]:
    """Yield a name beside `path` that is this process's alone; what has it at the end is removed.

    What a killed process has left under it is removed, too: whoever holds the lock knows that
    nobody else is writing. Where the file system has no locks, the name is this process's own.
    """
    with writing(path):
        lock = _when_free(path, wait)
    partial = _beside(path, f"partial-{os.getpid()}" if lock is None else "partial")
    try:
        _remove(partial)
        yield partial
    finally:
        _remove(partial)
        locks.remove(lock)


def _when_free(path: pathlib.Path, wait: float) -> Any:
    """Lock a path; signals end the waiting for another process, though not what follows."""
    end = time.monotonic() + wait
    while True:
        try:
            return locks.acquire(_beside(path, "lock"), path)
        except InputError:
            if time.monotonic() >= end:
                raise
        with signals.let_through():
            time.sleep(0.05)


def _beside(path: pathlib.Path, kind: str) -> pathlib.Path:
    return path.parent / f".{path.name}.{kind}"


def _remove(path: pathlib.Path) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _share(folder: pathlib.Path, mode: int) -> None:
    """Open a folder and all in it to whom its mode names: safetensors keeps files to the owner."""
    for place, _, names in os.walk(folder, topdown=False):
        for file in (pathlib.Path(place, name) for name in names):
            if not file.is_symlink():
                file.chmod(mode & 0o666)
        os.chmod(place, mode)


def _take_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Rename `partial` to `path`; a folder that is there is put back if that fails."""
    if not path.is_dir():
        partial.rename(path)
        return
    before = _beside(path, "replaced")
    path.rename(before)
    try:
        partial.rename(path)
    finally:
        _put_back(path)


def _put_back(path: pathlib.Path) -> None:
    """Put back the folder that `_take_place` has set aside, if it or its process failed then."""
    before = _beside(path, "replaced")
    if not os.path.lexists(path) and os.path.lexists(before):
        before.rename(path)
    _remove(before)
