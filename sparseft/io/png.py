"""Figures as PNG files: without a display, and the same bytes for the same figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft.io.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "blank_figure", "tidy_axes", "write_png"]

# Okabe and Ito: told apart by the colour-blind, and in grey by the markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# One more than colours: pairs repeat after 72 series, not after eight.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")


def blank_figure(wide: float, high: float, *, dpi: int) -> Figure:
    """Return an empty figure of so many inches.

    On the Agg canvas directly, so neither the display nor pyplot's global state is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def tidy_axes(axes: Any, *, grid: str = "both") -> None:
    """Draw a light grid (``"both"``, ``"x"``, ``"y"``) behind the data, and no box around it."""
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_png(figure: Figure, path: str | Path) -> None:
    """Write the figure; a file of that name is replaced whole or not at all."""
    buffer = io.BytesIO()
    # matplotlib writes its version into the file otherwise.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
