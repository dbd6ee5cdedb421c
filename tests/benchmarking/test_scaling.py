"""Curves of time and memory: which cases, which points, and the same picture every time."""

from __future__ import annotations

import pytest

from sparseft.benchmarking.scaling import (
    GRIDS,
    Grid,
    Point,
    scaling_cases,
    scaling_plot,
    scaling_points,
)

MIDDLE = (2, 16, 40, 4, 8)


def row(name, time, peak, *, density=None, ours=False):
    return {
        "name": name,
        "status": "ok",
        "ours": ours,
        "density": density,
        "facts": {} if peak is None else {"peak MB": peak},
        "clocks": {"wall": {"ratio": {"median": time}}},
    }


def case(shape, densities, scale=1.0):
    rows = [row("dense fine-tuning", 1.0, 100.0), row("frozen, forward and backward", 0.5, 25.0)]
    for density in densities:
        label = f"{100 * density:g}%"
        rows.append(row(f"ours, {label}", scale * density, 30.0, density=density, ours=True))
        rows.append(row(f"LoRA, as many as {label}", 2 * density, None, density=density))
    return {
        "status": "ok",
        "op": "step_classification",
        "shape": list(shape),
        "baseline": "dense fine-tuning",
        "contenders": rows,
    }


@pytest.fixture
def results():
    return [
        case(MIDDLE, (0.01, 0.1, 0.3)),
        case((2, 16, 40, 8, 8), (0.1,), scale=3.0),
        case((2, 32, 40, 4, 8), (0.1,), scale=5.0),
        {"status": "skipped", "shape": [2, 64, 40, 4, 8], "reason": "needs more"},
        {"status": "ok", "op": "topk", "shape": [], "contenders": []},
    ]


def test_points_lie_on_their_curves(results):
    points = scaling_points(results)

    def line(axis, way, what="time"):
        return [(p.at, getattr(p, what)) for p in points if (p.axis, p.way) == (axis, way)]

    assert line("batch", "ours") == [(4.0, 0.1), (8.0, pytest.approx(0.3))]
    assert line("width", "ours") == [(16.0, 0.1), (32.0, 0.5)]
    assert line("density", "ours") == [(0.01, 0.01), (0.1, 0.1), (0.3, 0.3)]
    assert line("density", "LoRA") == [(0.01, 0.02), (0.1, 0.2), (0.3, 0.6)]
    assert line("batch", "ours", "peak") == [(4.0, 0.3), (8.0, 0.3)]
    assert line("density", "LoRA", "peak")[0] == (0.01, None)
    # What has no density is level over all of them.
    assert line("density", "frozen, forward and backward") == [(0.01, 0.5), (0.1, 0.5), (0.3, 0.5)]
    assert Point("batch", 4.0, "dense fine-tuning", 1.0, 1.0, False) in points


def test_what_was_not_timed_has_no_point(results):
    for each in results[0]["contenders"]:
        if each["name"].startswith("ours, 10%"):
            del each["clocks"]
    points = [p for p in scaling_points(results) if p.way == "ours"]
    assert [p.at for p in points if p.axis == "density"] == [0.01, 0.3]
    assert [p.at for p in points if p.axis == "batch"] == [8.0]


def test_the_picture_is_the_same_every_time(results, tmp_path):
    first = scaling_plot(results, tmp_path / "first.png")
    second = scaling_plot(results, tmp_path / "second.png")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")
    results[0]["contenders"][2]["clocks"]["wall"]["ratio"]["median"] = 0.9
    assert scaling_plot(results, tmp_path / "other.png").read_bytes() != first.read_bytes()
    assert scaling_plot([], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("size", GRIDS)
def test_cases_of_a_grid(size):
    grid = GRIDS[size]
    cases = scaling_cases("mlm", size)
    shapes = [case.shape for case in cases]
    assert shapes[0] == grid.middle
    assert len(set(shapes)) == len(shapes)
    assert grid.batch in grid.batches
    assert grid.width in grid.widths
    assert grid.density in grid.densities
    assert len(cases) == 1 + len(grid.batches) - 1 + len(grid.widths) - 1
    assert all(case.op == "step_mlm" for case in cases)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="'huge' of the curves is not one of cuda, cpu, tiny"):
        scaling_cases(size="huge")


@pytest.mark.slow
def test_the_curves_of_a_run(tmp_path):
    from sparseft.benchmarking.suite import run_suite

    grid = Grid(
        layers=1,
        width=16,
        vocabulary=40,
        batch=1,
        length=4,
        density=0.1,
        batches=(1, 2),
        widths=(16,),
        densities=(0.05, 0.1),
    )
    results = run_suite(scaling_cases("causal", grid), "cpu", rounds=2, case_seconds=0.1)
    assert [r["status"] for r in results] == ["ok", "ok"]
    points = scaling_points(results)
    ours = {(p.axis, p.at) for p in points if p.ours}
    assert ours == {("batch", 1), ("batch", 2), ("width", 16), ("density", 0.05), ("density", 0.1)}
    assert all(p.time > 0 for p in points)
    assert all(0 < p.peak < 1 for p in points if p.ours)
    assert scaling_plot(results, tmp_path / "curves.png").stat().st_size > 10_000
