"""Results of a long evaluation, row by row in a work folder, so that a killed run can resume.

    rows = Rows(folder, settings)
    for key in keys:
        if key not in rows:
            rows.add(key, measure(key))
    rows.values()

A row is written when it is complete: a run that is killed and started again loses the row that it
was measuring, and repeats none.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from duo_jax import files
from duo_jax.cli import workdir
from duo_jax.errors import InputError
from duo_jax.process import signals

_FILE = "rows.jsonl"


class Rows:
    """JSON rows by key, in the order in which they were added.

    Args:
      folder: the work folder; made if it does not exist.
      settings: all that the results depend on, a dataclass or a dict: flags, and what files hold,
        such as `Runtime.weights_digest`.
      operational: its fields that may differ when a run is resumed.

    Raises:
      InputError: the folder belongs to another configuration or is in use, or its rows cannot be
        read.
    """

    def __init__(
        self, folder: pathlib.Path, settings: Any, *, operational: Sequence[str] = ()
    ) -> None:
        self._claim = workdir.claim(folder, settings, operational=operational)
        self._file = folder / _FILE
        self._rows = _read(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> list[str]:
        """Return the keys of all rows that are done."""
        return list(self._rows)

    def values(self) -> list[dict[str, Any]]:
        """Return all rows that are done."""
        return list(self._rows.values())

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Append a row; it is read back as JSON holds it (tuples become lists).

        Raises:
          InputError: it cannot be written.
          ValueError: there is a row of this key, or the row holds nan or infinity.
        """
        if key in self._rows:
            raise ValueError(f"{key=} has been added already")
        line = json.dumps({"key": key, "row": row}, allow_nan=False)
        files.append_text(self._file, line + "\n")
        self._rows[key] = json.loads(line)["row"]
        signals.check()


def _read(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Read the rows; a last line that a kill cut short is removed from the file."""
    if not files.exists(file):
        return {}
    with files.reading(file):
        text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        files.write_bytes(file, whole)
    rows = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            rows[record["key"]] = record["row"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{file}, line {number} is damaged; remove it or the folder") from None
    return rows
