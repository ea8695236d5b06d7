"""A work folder that belongs to exactly one configuration, so that a killed run can go on in it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from duo_jax import files
from duo_jax.errors import InputError

_CONFIG_FILE = "config.json"


def check(path: pathlib.Path, config: Any, *, operational: Sequence[str] = ()) -> None:
    """Refuse a work folder that cannot be used, before hours are spent; writes nothing.

    Args:
      path: the folder; need not exist.
      config: the run's settings, a dataclass or a dict.
      operational: its fields that may differ when a run is resumed, as they do not change results.

    Raises:
      InputError: the folder cannot be written, or holds a run of another configuration.
    """
    existing = next(p for p in (path, *path.absolute().parents) if files.exists(p))
    if not files.is_folder(existing) or not os.access(existing, os.W_OK):
        raise InputError(f"workdir {path} cannot be written")
    file = path / _CONFIG_FILE
    if not files.exists(file):
        with files.reading(path):
            # A kill may have left our own temporary file.
            others = existing == path and any(
                not other.name.startswith(".config") for other in path.iterdir()
            )
        if others:
            raise InputError(f"workdir {path} holds other files; choose an empty or new folder")
        return
    before, after = _flat(files.read_json(file)), _flat(_as_json(config))
    changed = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in operational
    ]
    if changed:
        raise InputError(
            f"{path} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another --workdir, or repeat the run's own settings"
        )


def claim(path: pathlib.Path, config: Any, *, operational: Sequence[str] = ()) -> None:
    """Make the folder if it does not exist, and let it belong to `config`; arguments as of `check`.

    Raises:
      InputError: as `check` does, or the folder cannot be made.
    """
    check(path, config, operational=operational)
    files.make_folder(path)
    files.write_text(path / _CONFIG_FILE, json.dumps(_as_json(config), indent=2) + "\n")


def _as_json(config: Any) -> Any:
    # Through JSON, so that tuples and lists compare equal.
    plain = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return json.loads(json.dumps(plain, default=str))


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names."""
    if not isinstance(values, dict | list) or not values:
        return {name: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat = {}
    for key, value in items:
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat
