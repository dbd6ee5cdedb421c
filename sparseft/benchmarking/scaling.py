"""How time and memory of a training step grow: curves in batch, model width and density.

One point of the curves is a case of `cases.training_step`, all ways to train in one run; ratios are
against dense fine-tuning of the same point, so that machines compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseft.benchmarking.suite import Case
from sparseft.io.png import COLOURS, MARKERS, blank_figure, tidy_axes, write_png

__all__ = ["AXES", "GRIDS", "Grid", "Point", "scaling_cases", "scaling_plot", "scaling_points"]

Facts = Mapping[str, Any]

# What varies, and its place in the shape of a case; the density is none of it.
AXES = {"batch": 3, "width": 1, "density": None}
_LABELS = {"batch": "sequences a step", "width": "width of the model", "density": "density"}
_MEASURES = {"time": "time of a step", "peak": "peak memory"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The middle of the curves, and where each goes.

    Args:
        layers, width, vocabulary, batch, length: of the middle.
        batches, widths: at the middle's density.
        density: the middle's.
        densities: at the middle's shape.
    """

    layers: int
    width: int
    vocabulary: int
    batch: int
    length: int
    density: float
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    densities: tuple[float, ...]

    @property
    def middle(self) -> tuple[int, ...]:
        """The shape, as cases have it."""
        return (self.layers, self.width, self.vocabulary, self.batch, self.length)


GRIDS = {
    "cuda": Grid(
        layers=12,
        width=768,
        vocabulary=250_002,
        batch=32,
        length=128,
        density=0.01,
        batches=(1, 4, 16, 32, 64, 128),
        widths=(256, 512, 768, 1024, 1536),
        densities=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "cpu": Grid(
        layers=4,
        width=384,
        vocabulary=25_000,
        batch=8,
        length=64,
        density=0.01,
        batches=(1, 2, 4, 8, 16, 32),
        widths=(128, 256, 384, 512, 768),
        densities=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "tiny": Grid(
        layers=1,
        width=16,
        vocabulary=40,
        batch=2,
        length=4,
        density=0.1,
        batches=(1, 2),
        widths=(16, 24),
        densities=(0.05, 0.1),
    ),
}


def scaling_cases(
    task: str = "classification", size: str | Grid = "cpu", dtype: str = "fp32"
) -> list[Case]:
    """Return the cases of the three curves, the middle one first and once.

    Args:
        task: ``"mlm"``, ``"classification"`` or ``"causal"``.
        size: a name of `GRIDS`, or a grid.
        dtype: ``"fp32"`` or ``"bf16"``.

    Raises:
        ValueError: no such grid; names those that there are.
    """
    from sparseft.benchmarking.cases.training_step import step_case

    if isinstance(size, str) and size not in GRIDS:
        raise ValueError(f"size {size!r} of the curves is not one of {', '.join(GRIDS)}")
    grid = GRIDS[size] if isinstance(size, str) else size
    middle = grid.middle
    shapes = {middle: tuple(sorted({*grid.densities, grid.density}))}
    for axis, values in (("batch", grid.batches), ("width", grid.widths)):
        for value in values:
            place = AXES[axis]
            shape = tuple(value if i == place else n for i, n in enumerate(middle))
            shapes.setdefault(shape, (grid.density,))
    return [step_case(task, shape, densities, dtype) for shape, densities in shapes.items()]


@dataclass(frozen=True)
class Point:
    """One way to train at one place of a curve.

    Args:
        axis: what varies: ``"batch"``, ``"width"``, ``"density"``.
        at: its value.
        way: ``"ours"``, ``"gradient mask"``, ``"LoRA"``, ``"SHiRA"``, or a name without density.
        time: seconds of a step over dense fine-tuning's, the median of the rounds' ratios.
        peak: peak bytes over dense fine-tuning's; None: not measured.
        ours: whether it is this package's.
    """

    axis: str
    at: float
    way: str
    time: float
    peak: float | None
    ours: bool


def scaling_points(results: Iterable[Facts]) -> list[Point]:
    """Return the curves' points from results of `run_suite` of `scaling_cases`.

    The middle is the case with the most densities; of the others the one number that differs says
    which curve they are on. Contenders that were not timed have no point.
    """
    cases = [r for r in results if r.get("status") == "ok" and len(r.get("shape", ())) == 5]
    if not cases:
        return []
    middle = max(cases, key=lambda r: len(_densities(r)))
    share = _middle_density(middle, cases)
    points = []
    for case in cases:
        for axis, place in AXES.items():
            if place is None:
                on = case is middle
            else:
                apart = [i for i, n in enumerate(case["shape"]) if n != middle["shape"][i]]
                on = apart in ([], [place])
            if on:
                points += _of_case(case, axis, place, share)
    return sorted(points, key=lambda p: (list(AXES).index(p.axis), p.way, p.at))


def _densities(case: Facts) -> list[float]:
    found = {row["density"] for row in case["contenders"] if row.get("density") is not None}
    return sorted(found)


def _middle_density(middle: Facts, cases: Sequence[Facts]) -> float | None:
    """The density of the cases that have one alone; of the middle if there are no others."""
    alone = [_densities(case) for case in cases if case is not middle]
    single = [found[0] for found in alone if len(found) == 1]
    every = _densities(middle)
    return single[0] if single else every[len(every) // 2] if every else None


def _of_case(case: Facts, axis: str, place: int | None, share: float | None) -> list[Point]:
    rows = case["contenders"]
    base = next((row for row in rows if row["name"] == case["baseline"]), None)
    dense = None if base is None else base["facts"].get("peak MB")
    points = []
    for row in rows:
        density = row.get("density")
        if not row.get("clocks") or (place is not None and density not in (None, share)):
            continue
        clock = next(iter(row["clocks"].values()))
        if "ratio" not in clock:
            continue
        mine = row["facts"].get("peak MB")
        peak = mine / dense if mine and dense else None
        name = row["name"] if density is None else row["name"].split(",")[0]
        places = [case["shape"][place]] if place is not None else [density]
        if places == [None]:  # it has none: a level line over all densities
            places = list(_densities(case))
        time = clock["ratio"]["median"]
        points += [Point(axis, float(at), name, time, peak, row["ours"]) for at in places]
    return points


def scaling_plot(results: Iterable[Facts], path: str | Path) -> Path | None:
    """Write a PNG: time above, peak memory below; batch, width and density side by side.

    The same results give the same bytes.

    Returns:
        The path; None if there are no points.
    """
    points = scaling_points(results)
    if not points:
        return None
    ways = sorted({p.way for p in points}, key=lambda way: (not _is_ours(points, way), way))
    figure = blank_figure(13.0, 7.6, dpi=130)
    for column, axis in enumerate(AXES, start=1):
        for row, measure in enumerate(_MEASURES):
            axes = figure.add_subplot(2, 3, 3 * row + column)
            _panel(axes, [p for p in points if p.axis == axis], ways, measure)
            axes.set_xscale("log", base=10 if axis == "density" else 2)
            if axis != "density":
                axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(_LABELS[axis])
            if column == 1:
                axes.set_ylabel(f"{_MEASURES[measure]} / dense fine-tuning's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    write_png(figure, path)
    return Path(path)


def _is_ours(points: Sequence[Point], way: str) -> bool:
    return any(p.ours for p in points if p.way == way)


def _panel(axes: Any, points: Sequence[Point], ways: Sequence[str], measure: str) -> None:
    for place, way in enumerate(ways):
        line = [(p.at, getattr(p, measure)) for p in points if p.way == way]
        line = [(x, y) for x, y in line if y is not None]
        axes.plot(
            [x for x, _ in line],
            [y for _, y in line],
            marker=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            linewidth=2.4 if _is_ours(points, way) else 1.2,
            label=way,
        )
    axes.set_ylim(bottom=0)
    tidy_axes(axes)
