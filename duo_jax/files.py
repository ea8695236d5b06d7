"""Outputs that appear only when they are complete."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from duo_jax.errors import InputError


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yield a temporary folder beside `path` that takes its name when the block succeeds.

    Args:
      path: the folder to make; its parents are made too.
      replace: overwrite an existing folder; otherwise it must not exist or be empty.

    Raises:
      InputError: `path` exists (and `replace` is false), or cannot be written.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; an output folder is needed")
    if not replace and path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} already exists; remove it or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield partial
        try:
            partial.chmod(0o755)
            _take_place(partial, path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _take_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Rename `partial` to `path`; a folder that is there is put back if that fails."""
    if not path.is_dir():
        partial.rename(path)
        return
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        path.rename(aside / "old")
        try:
            partial.rename(path)
        except BaseException:
            (aside / "old").rename(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
