"""Errors with a line for the user: input that cannot be used, an environment that cannot work."""

import importlib.metadata
import importlib.util
import pathlib
from typing import Any

_LONGEST_MESSAGE = 2_000  # characters; what a message quotes may be as long as a file
_LONGEST_QUOTED = 80


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one line for the person who gave it: what was wrong, and what is accepted. It is
    cut where it is very long, and put into one line: it may quote other libraries' messages, which
    quote whole files, and names of files, which may hold line ends.
    Command lines print it and exit with code 2; anything else is a defect and shows a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(cut(message, _LONGEST_MESSAGE).splitlines()))


def cut(text: str, limit: int) -> str:
    """Return the beginning of a text, with a word on how much was left out."""
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[:limit]}... ({left_out:,} more characters)"


def quoted(value: Any) -> str:
    """Return a value as a message quotes it: as Python writes it, cut where it is long."""
    if isinstance(value, str | bytes):
        value = value[: _LONGEST_QUOTED + 1]
    elif isinstance(value, int) and abs(value) >= 1 << 256:  # Python refuses to write the longest
        return f"a whole number of {value.bit_length():,} bits"
    elif isinstance(value, list | tuple | dict | set) and len(value) > _LONGEST_QUOTED:
        return f"a {type(value).__name__} of {len(value):,}"
    try:
        text = repr(value)
    except Exception:  # of what it holds, such as such a number
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}..."


# Files of ours that hold this mark: those that Python imports first, and those of the same path in
# Hugging Face's package `kernels`. Whichever package is installed last overwrites them.
_MARK = "Part of duo_jax."
_MARKED = {
    "kernels": ("__init__.py", "compat.py"),
    "train": ("__init__.py",),
    "convert": ("__init__.py",),
}
_INSTALLED = {"site-packages", "dist-packages"}  # folders that pip installs into


def check_packages() -> None:
    """Refuse an environment where another package has taken the place of one of ours.

    Our packages `kernels`, `train` and `convert` have names that others use too. Checks what lies
    beside duo_jax, and what Python finds under these names. A `train` or `convert` found anywhere
    but where pip installs packages is accepted: people have a train.py beside their scripts, and
    duo_jax imports neither of the two.

    Raises:
      ImportError: names the package, its path and the ways out, in one line.
    """
    for name, files in _MARKED.items():
        folders = [pathlib.Path(__file__).parents[1] / name]
        found = _found(name)
        if found is not None and (name == "kernels" or _INSTALLED & set(found.parts)):
            folders.append(found)
        for folder in folders:
            for file in files:
                _check(name, folder, file)


def _found(name: str) -> pathlib.Path | None:
    """Return the folder, or the file, that Python imports under a name, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return pathlib.Path(next(iter(spec.submodule_search_locations)))
    return pathlib.Path(spec.origin) if spec.origin else None


def _check(name: str, found: pathlib.Path, file: str) -> None:
    """Refuse a file without our mark; `found` is the package's folder, or a module's one file."""
    try:
        text = (found if found.is_file() else found / file).read_text(encoding="utf-8")
    except FileNotFoundError:
        if not found.exists():  # not installed, or imported from an archive
            return
        text = ""
    if _MARK not in text:
        installed = importlib.metadata.packages_distributions().get(name, [])
        others = [other for other in installed if other != "duo_jax"]
        raise ImportError(
            f"another package named {name!r} ({', '.join(others) or 'not installed by pip'}) is at "
            f"{found}, where duo_jax needs its own: give duo_jax an environment of its own (python "
            "-m venv), or remove that package and reinstall duo_jax",
            name=name,
            path=str(found),
        )
