"""The picture of an overlap report: three matrices, and below them layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparseft.composition.overlap_groups import kind_and_layer, natural_key
from sparseft.io.png import blank_figure, write_png

if TYPE_CHECKING:
    from sparseft.composition.overlap_pairs import Measure, OverlapReport

__all__ = ["plot_overlap"]

_Rows = Sequence[Sequence[float | None]]

_EMPTY = "0.88"  # light grey: nothing to compare
_MOST_ANNOTATED = 12  # columns whose cells have their numbers written in
_MOST_ROWS = 90  # below; more tensors are shown by layer
_LONGEST = 20  # letters of a column's label
_LETTER = 0.08  # inches of one, in the labels


class _Look(NamedTuple):
    """How one measure is drawn.

    Args:
        measure: which.
        title: above its panel.
        colours: matplotlib's name for them.
        signed: the colours part at 0, as far on both sides; else they begin at 0.
        least: the least that the last colour stands for, so that small values look small.
        form: of the numbers in the cells.
    """

    measure: Measure
    title: str
    colours: str
    signed: bool
    least: float
    form: str


# The lightness of the colours runs one way (or two, from 0): read in grey and by the colour blind.
_LOOKS = (
    _Look("jaccard", "Jaccard index of the masks", "viridis", False, 0.0, "{:.2f}"),
    _Look("conflict", "share of common entries with opposite signs\n(of independent changes: 0.5)",
          "OrRd", False, 0.5, "{:.2f}"),
    _Look("cosine", "cosine of the changes", "RdBu", True, 0.0, "{:+.2f}"),
)  # fmt: skip


class _Grid(NamedTuple):
    """Rows and columns with their labels, and the values of each measure."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[_Rows]
    axis: str  # what the columns are

    @property
    def labels(self) -> list[str]:
        """Column labels, the ends of long ones: adapters of one series differ there."""
        return [c if len(c) <= _LONGEST else f"…{c[1 - _LONGEST :]}" for c in self.columns]

    @property
    def annotated(self) -> bool:
        return len(self.columns) <= _MOST_ANNOTATED and len(self.rows) <= 2 * _MOST_ANNOTATED

    @property
    def row(self) -> float:
        """Inches of one row."""
        return 0.26 if len(self.rows) <= 40 else 0.15

    @property
    def height(self) -> float:
        """Inches, labels and title included."""
        upright = 0.2 if _fit(self.labels) else _LETTER * max(map(len, self.labels))
        return max(1.2, self.row * len(self.rows)) + upright + (0.25 if self.axis else 0.0) + 0.9

    @property
    def width(self) -> float:
        """Inches of all panels, labels and colour bars included."""
        cell = 0.42 if self.annotated else 0.25
        panel = max(2.2, cell * len(self.columns)) + 0.8
        return len(_LOOKS) * panel + _LETTER * max(map(len, self.rows))


def plot_overlap(report: OverlapReport, path: Path, pair: tuple[str, str] | None) -> Path:
    """Write the PNG; the same report gives the same bytes."""
    names = report.names
    if pair is None and len(names) == 2:
        pair = (names[0], names[1])
    lower = _by_layer(report) if pair is None else _by_kind(report, pair)
    heading = "each adapter with the others, mean by layer" if pair is None else _line(report, pair)
    grids = [(lower, heading)]
    if len(names) > 2:  # of two, the heading says it all
        upper = _Grid(names, names, [report.matrix(look.measure) for look in _LOOKS], "")
        grids.insert(0, (upper, _totals(report)))
    heights = [grid.height for grid, _ in grids]
    width = max(grid.width for grid, _ in grids)
    figure = blank_figure(width, sum(heights), dpi=110)
    parts = figure.subfigures(len(grids), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (grid, title) in zip(parts, grids, strict=True):
        part.suptitle(title, fontsize=11)
        _panels(part, grid)
    write_png(figure, path)
    return path


def _line(report: OverlapReport, pair: tuple[str, str]) -> str:
    total = report.pair(*pair)
    said = [f"Jaccard {total.jaccard:.3f}"]
    if total.times_chance is not None:
        said.append(f"{total.common:,} common entries, {total.times_chance:.1f} x chance")
    if total.conflict is not None:
        said.append(f"{total.conflict:.1%} with opposite signs")
    if total.cosine is not None:
        said.append(f"cosine {total.cosine:+.3f}")
    return f"{pair[0]} and {pair[1]}: {', '.join(said)}"


def _totals(report: OverlapReport) -> str:
    entries = sorted(report.nnz.values())
    size = f"{entries[0]:,}" if entries[0] == entries[-1] else f"{entries[0]:,} to {entries[-1]:,}"
    return f"{len(report.names)} adapters of {size} entries, all tensors"


def _fit(columns: Sequence[str]) -> bool:
    """Whether labels fit side by side."""
    return all(len(column) <= 3 for column in columns)


def _panels(figure: Any, grid: _Grid) -> None:
    """Draw one panel for each measure; row labels at the first only."""
    rows, columns = grid.rows, grid.labels
    panels = figure.subplots(1, len(_LOOKS), squeeze=False)[0]
    for i, (axes, look, values) in enumerate(zip(panels, _LOOKS, grid.values, strict=True)):
        low, high = _range(look, values)
        cells = [[math.nan if v is None else v for v in row] for row in values]
        image = axes.imshow(
            cells, cmap=look.colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
        )
        axes.set_facecolor(_EMPTY)
        axes.set_title(look.title, fontsize=9)
        axes.set_xlabel(grid.axis, fontsize=8)
        small = 8 if grid.row > 0.2 else 7
        turn = 0 if _fit(columns) else 90
        axes.set_xticks(range(len(columns)), columns, rotation=turn, fontsize=8)
        if i == 0:
            axes.set_yticks(range(len(rows)), rows, fontsize=small)
        else:
            axes.set_yticks([])
        # White lines keep cells of one colour apart. As two collections of lines: a tick for each
        # of them takes seconds.
        right, bottom = len(columns) - 0.5, len(rows) - 0.5
        lines = {"color": "white", "linewidth": 0.6}
        axes.vlines([x - 0.5 for x in range(1, len(columns))], -0.5, bottom, **lines)
        axes.hlines([y - 0.5 for y in range(1, len(rows))], -0.5, right, **lines)
        axes.set_xlim(-0.5, right)
        axes.set_ylim(bottom, -0.5)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if grid.annotated:
            _annotate(axes, image, values, look)
        bar = figure.colorbar(image, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)))
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)


def _annotate(axes: Any, image: Any, grid: _Rows, look: _Look) -> None:
    """Write the numbers into the cells, dark on light and light on dark."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value is None:
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                x, y, look.form.format(value), ha="center", va="center", fontsize=7,
                color="black" if light else "white",
            )  # fmt: skip


def _range(look: _Look, grid: _Rows) -> tuple[float, float]:
    """Return the values of the first and the last colour."""
    reach = max((abs(v) for row in grid for v in row if v is not None), default=0.0)
    reach = max(reach, look.least) or 1.0
    return (-reach if look.signed else 0.0), reach


def _by_layer(report: OverlapReport) -> _Grid:
    """Return layers by adapters: each adapter's mean with all others."""
    pairs = {pair: report.by("layer", *pair) for pair in report.pairs}
    layers = list(next(iter(pairs.values())))

    def mean(measure: Measure, layer: str, name: str) -> float | None:
        found = [getattr(by[layer], measure) for pair, by in pairs.items() if name in pair]
        there = [value for value in found if value is not None]
        return sum(there) / len(there) if there else None

    values = [
        [[mean(look.measure, layer, name) for name in report.names] for layer in layers]
        for look in _LOOKS
    ]
    return _Grid(_short(layers), report.names, values, "")


def _by_kind(report: OverlapReport, pair: tuple[str, str]) -> _Grid:
    """Return kinds of tensors by layers: one pair's values."""
    found = report.by("tensor", *pair)
    places = {tensor: kind_and_layer(tensor) for tensor in found}
    if len({kind for kind, _ in places.values()}) > _MOST_ROWS:
        found = report.by("layer", *pair)
        places = {layer: (layer, None) for layer in found}
    kinds = sorted({kind for kind, _ in places.values()}, key=natural_key)
    layers = sorted({layer for _, layer in places.values() if layer is not None})
    columns: list[int | None] = [*layers]
    if any(layer is None for _, layer in places.values()):
        columns.insert(0, None)
    at = {place: found[tensor] for tensor, place in places.items()}
    values = [
        [
            [getattr(at[kind, c], look.measure) if (kind, c) in at else None for c in columns]
            for kind in kinds
        ]
        for look in _LOOKS
    ]
    labels = ["–" if c is None else str(c) for c in columns]
    axis = "" if not layers else "layer" if None not in columns else "layer (–: in none)"
    return _Grid(_short(kinds), labels if layers else [""], values, axis)


def _short(names: Sequence[str]) -> list[str]:
    """Return the names without the leading parts that all of them share."""
    shared = os.path.commonprefix([name.split(".")[:-1] for name in names])
    return [".".join(name.split(".")[len(shared) :]) for name in names]
