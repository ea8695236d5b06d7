"""Columns of tables whose rows are JSON objects."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from duo_jax.reports import markdown

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table; a row that lacks its key has an empty cell."""

    title: str
    key: str
    form: str = "{}"  # of str.format
    unit: float = 1.0  # that numbers are divided by

    def cell(self, row: Row) -> str:
        """Return what a row shows."""
        if self.key not in row:
            return ""
        value = row[self.key]
        return self.form.format(value if self.unit == 1.0 else value / self.unit)


def table(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    titles = [column.title for column in columns]
    return markdown.table(titles, ([column.cell(row) for column in columns] for row in rows))
