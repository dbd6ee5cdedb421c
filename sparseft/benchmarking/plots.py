"""Pictures of records: speed against density, a roofline with the measured ceilings, bars.

All take lines as `read_records` and `make_records` give them, and leave out what was not timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseft.io.png import COLOURS, MARKERS, blank_figure, tidy_axes, write_png

__all__ = ["plot_density", "plot_roofline", "plot_speedups"]

Record = Mapping[str, Any]

_ACROSS = 3  # panels beside each other
_LONGEST = 44  # letters of a label


def plot_density(records: Iterable[Record], path: str | Path) -> Path | None:
    """Draw speed against density, in times its baseline's (``against``): a panel a case.

    What has no density is a dashed line; ours are thick.

    Returns:
        The path; None if no case has rows at two densities or more.
    """
    cases = _by_case(r for r in _timed(records) if r.get("ratio"))
    shown = {
        name: rows
        for name, rows in cases.items()
        if len({r["density"] for r in rows if r.get("density") is not None}) > 1
    }
    if not shown:
        return None
    across = min(_ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure = blank_figure(5.2 * across, 4.4 * down, dpi=130)
    for number, (name, rows) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        for place, (label, points) in enumerate(_series(rows).items()):
            colour = COLOURS[place % len(COLOURS)]
            if points[0].get("density") is None:
                speed = 1 / points[0]["ratio"]["median"]
                axes.axhline(speed, color=colour, linestyle="--", linewidth=1, label=label)
                continue
            points.sort(key=lambda r: r["density"])
            axes.errorbar(
                [r["density"] for r in points],
                [1 / r["ratio"]["median"] for r in points],
                yerr=_bars(points),
                marker=MARKERS[place % len(MARKERS)],
                color=colour,
                capsize=3,
                linewidth=2 if points[0]["ours"] else 1,
                label=label,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        densities = sorted({r["density"] for r in rows if r.get("density") is not None})
        axes.set_xticks(densities, [f"{100 * d:.3g}%" for d in densities])
        axes.minorticks_off()
        _plain_ticks(axes.yaxis, [1 / r["ratio"]["median"] for r in rows])
        axes.set_xlabel("density")
        axes.set_ylabel("times the speed of its baseline (median, quartiles)")
        axes.set_title(_plain(name), fontsize=9)
        axes.legend(fontsize=6, frameon=False)
        tidy_axes(axes)
    write_png(figure, path)
    return Path(path)


def plot_roofline(records: Iterable[Record], path: str | Path) -> Path | None:
    """Draw operations a second against operations a byte, below what was measured in the runs.

    Full markers are ours, hollow ones competitors'; the slope is the copy's bandwidth, the levels
    are the products of each dtype, each the best of the runs.

    Returns:
        The path; None if no timed row has both bytes and operations, beside ceilings.
    """
    rows = [r for r in _timed(records) if r.get("bytes") and r.get("flops") and r.get("ceilings")]
    if not rows:
        return None
    figure = blank_figure(7.2, 5.4, dpi=130)
    axes = figure.add_subplot()
    copy = max(r["ceilings"]["copy"] for r in rows)
    products: dict[str, float] = {}
    for row in rows:
        speed = row["ceilings"]["gemm"].get(row["dtype"])
        if speed is not None:
            products[row["dtype"]] = max(speed, products.get(row["dtype"], 0.0))
    intensity = [r["flops"] / r["bytes"] for r in rows]
    ridges = [speed / copy for speed in products.values()]
    low = min([*intensity, *ridges]) / 2
    high = max([*intensity, *(2 * ridge for ridge in ridges)]) * 2
    top = max(products.values(), default=high * copy)
    axes.plot([low, top / copy], [low * copy * 1e-12, top * 1e-12], color="black", linewidth=1)
    axes.annotate(
        f"copy, {copy * 1e-9:.3g} GB/s", (low, low * copy * 1e-12), fontsize=7, va="bottom"
    )
    for dtype, speed in products.items():
        axes.plot([speed / copy, high], [speed * 1e-12] * 2, color="black", linewidth=1)
        text = f"GEMM {dtype}, {speed * 1e-12:.3g}"
        axes.annotate(text, (high, speed * 1e-12), fontsize=7, ha="right", va="bottom")
    for place, op in enumerate(dict.fromkeys(r["op"] for r in rows)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        for ours in (True, False):
            those = [r for r in rows if r["op"] == op and bool(r["ours"]) is ours]
            if not those:
                continue
            axes.plot(
                [r["flops"] / r["bytes"] for r in those],
                [r["flops"] / r["median"] * 1e-12 for r in those],
                linestyle="none",
                marker=marker,
                markersize=6,
                markeredgecolor=colour,
                markerfacecolor=colour if ours else "none",
                label=_plain(f"{op}, {'ours' if ours else 'others'}"),
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    # Who skips operations that are counted for everyone can be above the roof.
    skipped = any((r.get("case_facts") or {}).get("operations") for r in rows)
    axes.set_ylabel("TFLOP/s, counted as in the dense form" if skipped else "TFLOP/s")
    axes.set_title("Roofline with the ceilings measured in the run", fontsize=10)
    axes.legend(fontsize=6, frameon=False)
    tidy_axes(axes)
    write_png(figure, path)
    return Path(path)


def plot_speedups(records: Iterable[Record], path: str | Path) -> Path | None:
    """Draw a bar for each row of ours: how many times faster than its baseline (``against``).

    Returns:
        The path; None if nothing of ours was timed beside a baseline.
    """
    rows = [r for r in _timed(records) if r["ours"] and r.get("ratio")]
    rows = [r for r in rows if r["contender"] != r.get("baseline")]
    if not rows:
        return None
    figure = blank_figure(8.4, 1.2 + 0.26 * len(rows), dpi=130)
    axes = figure.add_subplot()
    values = [1 / r["ratio"]["median"] for r in rows]
    colours = [COLOURS[0] if v >= 1 else COLOURS[1] for v in values]
    axes.barh(
        range(len(rows)),
        [v - 1 for v in values],
        left=1.0,
        xerr=_bars(rows),
        color=colours,
        capsize=2,
    )
    axes.set_ylim(-0.7, len(rows) - 0.3)
    labels = [_cut(f"{r['case']}: {r['contender']}", 2 * _LONGEST) for r in rows]
    axes.set_yticks(range(len(rows)), [_plain(label) for label in labels], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, [*values, 1.0])
    axes.minorticks_off()
    axes.set_xlabel("times the speed of its baseline (median and quartiles of rounds)")
    tidy_axes(axes)
    write_png(figure, path)
    return Path(path)


def _timed(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r["status"] == "ok" and r.get("median")]


def _by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    return cases


def _series(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the rows by name without their density: one line each. Several of one: the median's.

    A name has its density as ``1%`` or ``1.00%``, after ``ours,`` say.
    """
    lines: dict[str, dict[float | None, list[Record]]] = {}
    for row in rows:
        name = row["contender"]
        if row.get("density") is not None:
            words = [word for word in name.split() if not word.rstrip(",").endswith("%")]
            name = " ".join(words).strip(" ,:") or ("ours" if row["ours"] else "others")
        lines.setdefault(_cut(name, _LONGEST), {}).setdefault(row.get("density"), []).append(row)
    # Ours first: the same colour in every panel.
    lines = dict(sorted(lines.items(), key=lambda item: not _first(item[1])["ours"]))
    return {
        _plain(name): [
            sorted(same, key=lambda r: r["median"])[len(same) // 2] for same in points.values()
        ]
        for name, points in lines.items()
    }


def _first(points: Mapping[float | None, list[Record]]) -> Record:
    return next(iter(points.values()))[0]


def _bars(points: Sequence[Record]) -> list[list[float]]:
    """Return how far speeds reach down and up; a ratio's upper quartile is the lower one of it."""
    below = [1 / r["ratio"]["median"] - 1 / r["ratio"]["quartile3"] for r in points]
    above = [1 / r["ratio"]["quartile1"] - 1 / r["ratio"]["median"] for r in points]
    return [_positive(below), _positive(above)]


def _positive(values: Sequence[float]) -> list[float]:
    return [max(0.0, value) for value in values]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # else mathematics


def _plain_ticks(axis: Any, speeds: Sequence[float]) -> None:
    """Label an axis of speeds with plain numbers, as many as there is room for."""
    from matplotlib.ticker import LogLocator

    wide = max(speeds) / min(speeds) > 500
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
