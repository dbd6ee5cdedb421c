"""Pictures: the same bytes for the same figure, and nothing of a display touched."""

from __future__ import annotations

import sys
from pathlib import Path

from sparseft.io.png import blank_figure, tidy_axes, write_png


def _draw(path: Path, height: float) -> bytes:
    figure = blank_figure(2.0, 1.0, dpi=50)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, height])
    tidy_axes(axes, grid="y")
    assert not axes.spines["top"].get_visible()
    write_png(figure, path)
    return path.read_bytes()


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path):
    first = _draw(tmp_path / "a.png", 1.0)
    assert first.startswith(b"\x89PNG")
    assert _draw(tmp_path / "b.png", 1.0) == first
    assert _draw(tmp_path / "b.png", 2.0) != first
    assert b"matplotlib" not in first.lower()
    assert (
        "matplotlib.pyplot" not in sys.modules
        or sys.modules["matplotlib.pyplot"].get_fignums() == []
    )
