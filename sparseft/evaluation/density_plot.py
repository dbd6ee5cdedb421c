"""The plot of a sweep: score against density, one line a method."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sparseft.evaluation.plot import COLOURS, MARKERS
from sparseft.io.atomic import atomic_write

if TYPE_CHECKING:
    from sparseft.evaluation.report import Results

__all__ = ["plot_densities"]


def plot_densities(results: Results, path: str | Path, metric: str) -> None:
    """Write a PNG: mean over the target languages by density, bars for the deviation over seeds.

    Settings without a density (full fine-tuning) are dashed lines. Drawn with the Agg canvas
    directly, so neither the display nor pyplot's global state is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = [s for s in results.summary(metric) if s.mean is not None]
    densities = sorted({s.density for s in summaries if s.density is not None})
    names = list(dict.fromkeys(s.setting for s in summaries))
    figure = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        points = [
            (s.density, s.mean)
            for s in summaries
            if s.setting == name and s.density is not None and s.mean is not None
        ]
        whole = [s.mean for s in summaries if s.setting == name and s.density is None]
        # Side by side, or the bars of methods that agree would hide each other.
        shift = 1.02 ** (i - (len(names) - 1) / 2)
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
                label=name,
            )
        for cell in whole:
            if cell is not None:
                axes.axhline(
                    100 * cell.mean, color=colour, linestyle="--", linewidth=1.2, label=name
                )
    axes.set_xscale("log")
    axes.set_xticks([100 * d for d in densities], [f"{100 * d:g} %" for d in densities])
    axes.minorticks_off()
    axes.set_xlabel("density of the mask")
    axes.set_ylabel(f"{metric.replace('_', '-')} x 100, mean of target languages")
    axes.set_title(results.title, fontsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    # matplotlib writes its version into the file otherwise; the same results give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
