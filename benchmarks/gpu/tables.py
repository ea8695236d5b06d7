"""Stages with a share of the time, and the table that each of them leaves as a JSON file.

The file is written anew after every row: what was measured survives whatever ends the run.
"""

import dataclasses
import gc
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from duo_jax import files

Item = TypeVar("Item")
_MAX_REASON = 240  # characters


class Table:
    """Rows of one stage."""

    def __init__(
        self, name: str, *, folder: pathlib.Path, header: dict[str, Any], deadline: float
    ) -> None:
        """Begin an empty table.

        Args:
          name: of the stage; the file is `name`.json.
          folder: where it is written.
          header: what was measured on what.
          deadline: when the stage's share of the time ends, as time.monotonic() counts.
        """
        self.name, self.rows = name, []
        self.not_reached, self.does_not_fit = [], []
        self.status = "running"
        self.notes: dict[str, Any] = {}
        self._path, self._header, self._deadline = folder / f"{name}.json", header, deadline
        self._began = time.monotonic()

    @property
    def time_left(self) -> float:
        """Seconds until the stage's share ends."""
        return self._deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """Append a row."""
        self.rows.append(row)
        self.write()

    def in_time(self, items: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
        """Yield named items while there is time; the names of the others are listed."""
        for name, item in items:
            if self.time_left > 0:
                yield name, item
            else:
                self.not_reached.append(name)

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what a function returns; a failure becomes a row, and None is returned."""
        try:
            return measure()
        except Exception as error:  # whatever it is, the other rows are worth having
            failed = reason(error)
        gc.collect()  # the frames that failed held arrays
        self.add(name=name, failed=failed)
        return None

    def write(self) -> None:
        """Write the file."""
        content = {
            "table": self.name,
            "status": self.status,
            **self._header,
            "seconds": round(time.monotonic() - self._began, 1),
            **self.notes,
            "not_reached": self.not_reached,
            "does_not_fit": self.does_not_fit,
            "rows": self.rows,
        }
        files.write_text(self._path, json.dumps(content, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the report."""

    name: str
    share: float  # fraction of the time; unused time passes on
    run: Callable[[Table], None]


def run(
    stages: list[Stage],
    tables: dict[str, Table],
    *,
    folder: pathlib.Path,
    header: dict[str, Any],
    began: float,
    seconds: float,
) -> None:
    """Run stages in order, each until its deadline, and put their tables into `tables`.

    A stage that raises is recorded with its reason in one line; the next one runs all the same.
    """
    total, due = sum(stage.share for stage in stages), 0.0
    for stage in stages:
        due += seconds * stage.share / total
        table = Table(stage.name, folder=folder, header=header, deadline=began + due)
        tables[stage.name] = table
        table.write()
        try:
            stage.run(table)
            table.status = "out of time" if table.not_reached else "complete"
        except Exception as error:
            table.status = f"failed: {reason(error)}"
        gc.collect()
        table.write()
        print(f"{stage.name}: {table.status}, {len(table.rows)} rows", flush=True)


def op_of(name: str) -> str:
    """Return the op of a case by its name, "op: case"."""
    return name.partition(":")[0]


def incomplete_ops(rows: list[dict[str, Any]], not_reached: list[str]) -> set[str]:
    """Return the ops of which a case failed or was not reached."""
    failed = [row["name"] for row in rows if "failed" in row]
    return {op_of(name) for name in [*failed, *not_reached]}


def reason(error: BaseException) -> str:
    """Say in one line what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_REASON]
