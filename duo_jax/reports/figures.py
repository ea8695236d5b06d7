"""Figures as PNG files, drawn without a display and without pyplot's global state."""

import io
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    file = io.BytesIO()
    # Without matplotlib's version in it: equal pictures are equal files.
    figure.savefig(file, dpi=dpi, format="png", metadata={"Software": None})
    return file.getvalue()


def save(figure: Figure, path: str | pathlib.Path, *, dpi: int = 100) -> None:
    """Write the figure as a PNG file that appears only when it is complete.

    Raises:
      InputError: it cannot be written.
    """
    files.write_bytes(path, png(figure, dpi=dpi))
