"""The plot of results: dots by language, one colour a setting, bars for the deviation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparseft.data.languages import builtin_languages
from sparseft.io.png import COLOURS, MARKERS, blank_figure, tidy_axes, write_png

if TYPE_CHECKING:
    from sparseft.evaluation.report import Results

__all__ = ["plot_results"]


def plot_results(results: Results, path: str | Path, metric: str) -> None:
    """Write a PNG of one metric: each language's mean and deviation by setting, then the mean."""
    summaries = results.summary(metric)
    languages = results.languages()
    names = builtin_languages()
    with_mean = len([c for c in languages if c != results.source_language]) > 1
    places = len(languages) + with_mean
    wide = max(5.0, 1.6 + 0.95 * places)
    longest = max((len(s.label) for s in summaries), default=1)
    columns = max(1, min(4, len(summaries), round(8 * wide) // (6 + longest)))
    legend = math.ceil(len(summaries) / columns)  # lines of it, below the axes
    figure = blank_figure(wide, 4.0 + 0.2 * legend, dpi=150)
    axes = figure.add_subplot()
    width = 0.6 / max(1, len(summaries))
    for i, s in enumerate(summaries):
        cells = [(x, s.languages[c]) for x, c in enumerate(languages) if c in s.languages]
        if with_mean and s.mean is not None:
            cells.append((len(languages), s.mean))
        shift = (i - (len(summaries) - 1) / 2) * width
        axes.errorbar(
            [x + shift for x, _ in cells],
            [100 * cell.mean for _, cell in cells],
            yerr=[100 * (cell.sd or 0.0) for _, cell in cells],
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=6,
            capsize=3,
            linewidth=1.2,
            label=s.label,
        )
    ticks = [
        names.name(c) + ("\n(source)" if c == results.source_language else "") for c in languages
    ]
    if with_mean:
        ticks.append("mean")
        axes.axvline(len(languages) - 0.5, color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(places), ticks, rotation=30 if places > 6 else 0)
    axes.set_xlim(-0.5, places - 0.5)
    axes.set_ylabel(f"{metric.replace('_', '-')} x 100")
    axes.set_title(results.title, fontsize=11)
    tidy_axes(axes, grid="y")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    write_png(figure, path)
