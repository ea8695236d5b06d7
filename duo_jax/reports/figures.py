"""Figures as PNG files, drawn without a display and without pyplot's global state."""

import io
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from duo_jax import files


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """Return a figure of `width` x `height` inches and its axes.

    Args:
      width: in inches.
      height: in inches.
      **subplots: arguments of `Figure.subplots`, such as nrows, ncols, sharex; one plot by default.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def png(figure: Figure, *, dpi: int = 100) -> bytes:
    """Return the figure as the content of a PNG file."""
    _show_as_written(figure)
    file = io.BytesIO()
    # Without matplotlib's version in it: equal pictures are equal files.
    figure.savefig(file, dpi=dpi, format="png", metadata={"Software": None})
    return file.getvalue()


def no_values(axes: Any, what: str) -> None:
    """Say in an empty plot that there is nothing to draw."""
    place = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, f"no {what}", color="grey", **place)


def save(figure: Figure, path: str | pathlib.Path, *, dpi: int = 100) -> None:
    """Write the figure as a PNG file that appears only when it is complete.

    Raises:
      InputError: it cannot be written.
    """
    files.write_bytes(path, png(figure, dpi=dpi))


def _show_as_written(figure: Figure) -> None:
    """Let names, such as a model's, be no formulas, as "a$b$" would be, and no half characters.

    The labels of ticks may be formulas: a logarithmic axis writes 10 to the power of 3 as one.
    """
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    of_ticks = {text for axis in axes for text in axis.findobj(Text)} - {a.label for a in axes}
    for text in set(figure.findobj(Text)) - of_ticks:
        text.set_parse_math(False)
        text.set_text(text.get_text().encode("utf-8", "replace").decode())
