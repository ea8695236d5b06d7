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
        partial.chmod(0o755)
        if path.is_dir():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.rename(old / "old")
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
