"""Work folders: each belongs to one configuration, so that a killed run can be resumed in it."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from duo_jax import files
from duo_jax.errors import InputError, quoted
from duo_jax.process import locks
from duo_jax.schema.json_reader import read_json

_CONFIG_FILE = "config.json"
_LOCK_FILE = ".lock"


def check(path: pathlib.Path, config: Any, *, operational: Sequence[str] = ()) -> None:
    """Refuse a work folder that cannot be used, before hours are spent. Leaves nothing.

    Args:
      path: the folder; need not exist.
      config: the run's settings, a dataclass or a dict.
      operational: fields that may differ when a run is resumed, as they do not change results.

    Raises:
      InputError: the folder cannot be written, or holds a run of another configuration.
    """
    file = path / _CONFIG_FILE
    files.check_place(file)
    if not files.exists(file):
        with files.reading(path):
            # A kill may have left our own temporary file, and leaves the lock's.
            others = files.exists(path) and any(
                other.name != _LOCK_FILE and not other.name.startswith(f".{_CONFIG_FILE}.")
                for other in path.iterdir()
            )
        if others:
            raise InputError(f"workdir {path} holds other files; choose an empty or new folder")
        return
    changes = _changes(read_json(file), _as_json(config))
    changed = {
        name: f"{name} was {quoted(before)}, is {quoted(after)}"
        for name, before, after in changes
        if name not in operational
    }
    # A digest tells nothing beside a setting that decides what it is of.
    told = [said for name, said in changed.items() if not name.endswith("_digest")]
    if changed:
        raise InputError(
            f"{path} holds a run of another configuration "
            f"({'; '.join(told or changed.values())}); "
            "choose another --workdir, or repeat the run's own settings"
        )


def claim(path: pathlib.Path, config: Any, *, operational: Sequence[str] = ()) -> object:
    """Make a work folder, or resume in one that belongs to `config`; arguments as in `check`.

    Returns:
      Something to keep: no other process can claim the folder before it is forgotten.

    Raises:
      InputError: as `check`, another process has the folder, or it cannot be made.
    """
    check(path, config, operational=operational)
    files.make_folder(path)
    with files.writing(path):
        lock = locks.acquire(path / _LOCK_FILE, path, again=True)
    check(path, config, operational=operational)  # another run may have begun here meanwhile
    files.write_text(path / _CONFIG_FILE, json.dumps(_as_json(config), indent=2) + "\n")
    return lock


def _as_json(config: Any) -> Any:
    # Through JSON, so that tuples and lists compare equal.
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return json.loads(json.dumps(config, default=str))


def _changes(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that differ, by dotted names, which grow only where both have the key."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _changes(before.get(key), after.get(key), inner)
    elif before != after:
        yield name, before, after
