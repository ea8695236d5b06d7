"""Results of a long evaluation, row by row in a work folder, so that a killed run can resume.

    rows = Rows(folder, settings)
    for key in keys:
        if key not in rows:
            rows.add(key, measure(key))
    rows.values()

A row is written when it is complete: a run that is killed and started again loses the row that it
was measuring, and repeats none. A row that was damaged meanwhile is set aside and measured again.
"""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from duo_jax.cli import workdir
from duo_jax.process import signals
from duo_jax.schema import json_lines
from duo_jax.schema.check import convert

_FILE = "rows.jsonl"


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    row: dict[str, Any]


class Rows:
    """JSON rows by key, in the order in which they were added.

    Args:
      folder: the work folder; made if it does not exist.
      settings: all that the results depend on, a dataclass or a dict: flags, and what files hold,
        such as `Runtime.weights_digest`.
      operational: its fields that may differ when a run is resumed.
      kind: what a row holds, a TypedDict.

    Raises:
      InputError: the folder belongs to another configuration or is in use, or its rows cannot be
        read.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: Any,
        *,
        operational: Sequence[str] = (),
        kind: Any = dict[str, Any],
    ) -> None:
        self._claim = workdir.claim(folder, settings, operational=operational)

        def check(values: dict[str, Any], where: str) -> _Line:
            line = convert(values, _Line, where)
            convert(line.row, kind, where)
            return line

        self._file = folder / _FILE
        lines = json_lines.read(self._file, check, lost="what it held is measured again")
        self._rows = {line.key: line.row for line in lines}

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

    def note_older(self) -> None:
        """Say on stderr how many rows an earlier version measured, without likelihoods."""
        older = sum("exact" in row and "nll" not in row for row in self._rows.values())
        if older:
            print(
                f"{self._file}: {older:,} rows of an earlier version hold no likelihoods, which "
                "tables leave out; remove the file to measure them again",
                file=sys.stderr,
            )

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Append a row; it is read back as JSON holds it (tuples become lists).

        Raises:
          InputError: it cannot be written.
          ValueError: there is a row of this key, or the row holds nan or infinity, or 1 MB.
        """
        if key in self._rows:
            raise ValueError(f"{key=} has been added already")
        json_lines.append(self._file, {"key": key, "row": row})
        self._rows[key] = json.loads(json.dumps(row))
        signals.check()
