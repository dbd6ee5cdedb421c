"""The plot of a sweep: score against density, one line a method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparseft.evaluation.comparison import mean_cell
from sparseft.io.png import COLOURS, MARKERS, blank_figure, tidy_axes, write_png

if TYPE_CHECKING:
    from sparseft.evaluation.report import Results

__all__ = ["plot_densities"]


def plot_densities(results: Results, path: str | Path, metric: str) -> None:
    """Write a PNG: mean over the target languages (with none, the source's score) by density, bars
    for the deviation over seeds.

    Settings without a density (full fine-tuning) are dashed lines.
    """
    summaries = [(s, cell) for s in results.summary(metric) if (cell := mean_cell(s)) is not None]
    densities = sorted({s.density for s, _ in summaries if s.density is not None})
    names = list(dict.fromkeys(s.setting for s, _ in summaries))
    figure = blank_figure(6.4, 4.6, dpi=150)
    axes = figure.add_subplot()
    steps = [b / a for a, b in zip(densities, densities[1:], strict=False)]
    spread = min([1.15, *(step**0.25 for step in steps)])
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        label = name.replace("$", r"\$")  # else mathematics
        points = [
            (s.density, cell)
            for s, cell in summaries
            if s.setting == name and s.density is not None
        ]
        whole = [cell for s, cell in summaries if s.setting == name and s.density is None]
        # Side by side, or the bars of methods that agree would hide each other.
        shift = spread ** (i / max(1, len(names) - 1) - 0.5)
        if points:
            points.sort(key=lambda point: point[0])
            axes.errorbar(
                [100 * d * shift for d, _ in points],
                [100 * cell.mean for _, cell in points],
                yerr=[100 * (cell.sd or 0.0) for _, cell in points],
                marker=MARKERS[i % len(MARKERS)],
                color=colour,
                markersize=6,
                capsize=3,
                linewidth=1.2,
                linestyle=("-", ":", "-.")[i // len(COLOURS) % 3],
                label=label,
            )
        for cell in whole:
            axes.axhline(100 * cell.mean, color=colour, linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.set_xticks([100 * d for d in densities], [f"{100 * d:g} %" for d in densities])
    axes.minorticks_off()
    axes.set_xlabel("density of the mask")
    axes.set_ylabel(f"{metric.replace('_', '-')} x 100")
    axes.set_title(results.title, fontsize=11)
    tidy_axes(axes)
    columns = max(1, min(4, 64 // (6 + max(map(len, names), default=1))))
    figure.legend(
        loc="outside lower center", ncols=min(columns, len(names)), frameon=False, fontsize=9
    )
    write_png(figure, path)
