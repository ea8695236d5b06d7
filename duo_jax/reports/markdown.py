"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, aligned: bool = False
) -> str:
    """Return a Markdown table; None becomes an empty cell. No newline at the end.

    table(["a", "b"], [[1, None]]) is

        | a | b |
        |---|---|
        | 1 |  |

    With `aligned`, cells are padded to the width of their column, for reading in a terminal.
    """
    lines = [["" if cell is None else str(cell) for cell in line] for line in (columns, *rows)]
    rule = "---|" * len(columns)
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
        rule = "".join("-" * (width + 2) + "|" for width in widths)
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + rule, *rest])
