"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; None becomes an empty cell. No newline at the end.

    table(["a", "b"], [[1, None]]) is

        | a | b |
        |---|---|
        | 1 |  |
    """
    lines = [columns, *rows]
    cells = (["" if cell is None else str(cell) for cell in line] for line in lines)
    first, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, "|" + "---|" * len(columns), *rest])
