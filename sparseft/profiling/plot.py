"""A `Profile` as stacked bars: predicted beside measured, a colour a part."""

from __future__ import annotations

from pathlib import Path

from sparseft._text import human_bytes
from sparseft.io.png import COLOURS, blank_figure, tidy_axes, write_png
from sparseft.profiling.memory import PARTS, MemoryUse
from sparseft.profiling.profiles import Profile
from sparseft.profiling.report import label_of, lines_above

__all__ = ["plot_profile"]

_GIB = 1 << 30
_WIDTH = 0.38
_NAMES = {"diff": "diff, indices, base"}
# A limit far above every bar would flatten them.
_HIGHEST_LIMIT = 1.6


def plot_profile(found: Profile, path: str | Path) -> None:
    """Write a PNG of every way's peak memory by part, in GiB; hatched bars are predictions."""
    from matplotlib.patches import Patch

    rows = [row for row in found.rows if row.predicted is not None or row.measured is not None]
    measured = any(row.measured is not None for row in rows)
    figure = blank_figure(max(6.5, 1.8 + 0.9 * len(rows)), 5.2, dpi=150)
    axes = figure.add_subplot()
    colours = dict(zip(PARTS, COLOURS, strict=False))
    shift = _WIDTH / 2 if measured else 0.0
    highest = 0.0
    for x, row in enumerate(rows):
        for use, place, hatch in (
            (row.predicted, x - shift, "////"),
            (row.measured, x + shift, ""),
        ):
            if use is None:
                continue
            _bar(axes, use, place, hatch, colours)
            highest = max(highest, use.peak / _GIB)
            axes.annotate(
                human_bytes(use.peak),
                (place, use.peak / _GIB),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
    for fit in found.fits:
        limit = fit.limit / _GIB
        if limit <= highest * _HIGHEST_LIMIT:
            axes.axhline(limit, color="0.3", linewidth=1, linestyle="--")
            axes.annotate(fit.text, (len(rows) - 0.5, limit), ha="right", va="bottom", fontsize=8)
            highest = max(highest, limit)
    axes.set_xticks(range(len(rows)), [label_of(row.way).replace(" ", "\n", 1) for row in rows])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_ylim(0, 1.22 * highest or 1)  # room for the figures above the bars
    axes.set_ylabel("peak memory of a step, GiB")
    axes.set_title(lines_above(found)[0], fontsize=9)
    tidy_axes(axes, grid="y")
    handles = [Patch(color=colours[part], label=_NAMES.get(part, part)) for part in PARTS]
    handles.append(
        Patch(facecolor="white", edgecolor="0.3", hatch="////", label="hatched: predicted")
    )
    if measured:
        handles.append(Patch(facecolor="white", edgecolor="0.3", label="plain: measured"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    write_png(figure, path)


def _bar(axes, use: MemoryUse, place: float, hatch: str, colours: dict[str, str]) -> None:
    bottom = 0.0
    for part, size in use.parts().items():
        axes.bar(
            place,
            size / _GIB,
            _WIDTH * 0.94,
            bottom=bottom,
            color=colours[part],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.4,
        )
        bottom += size / _GIB
