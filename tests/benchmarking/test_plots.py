"""Pictures of records: drawn without a display, the same bytes from the same records."""

from __future__ import annotations

import pytest

from sparseft.benchmarking import plots
from sparseft.benchmarking.plots import plot_density, plot_roofline, plot_speedups

SPREAD = {"median": 0.5, "quartile1": 0.4, "quartile3": 0.8, "min": 0.4}


def record(contender, *, density=None, ours=True, **words):
    return {
        "case": "add/8x8/fp32",
        "op": "add",
        "dtype": "fp32",
        "contender": contender,
        "status": "ok",
        "ours": ours,
        "density": density,
        "median": 1e-3,
        "ratio": SPREAD,
        "baseline": "dense",
        "bytes": 1e6,
        "flops": 4e6,
        "ceilings": {"copy": 1e10, "gemm": {"fp32": 1e11, "bf16": 2e11}},
        **words,
    }


RECORDS = [
    record("dense", ours=False, ratio=dict.fromkeys(SPREAD, 1.0)),
    record("ours, 1%", density=0.01),
    record("ours, 10%", density=0.1),
    record("gather $x$, 1%", density=0.01, ours=False, dtype="bf16"),
    record("red one", status="red", median=None, ratio=None),
]


@pytest.mark.parametrize("draw", [plot_density, plot_roofline, plot_speedups])
def test_the_same_records_give_the_same_png(draw, tmp_path):
    path = draw(RECORDS, tmp_path / "one.png")
    assert path == tmp_path / "one.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert draw(RECORDS, tmp_path / "two.png").read_bytes() == path.read_bytes()


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    path = tmp_path / "x.png"
    assert plot_density([RECORDS[0], RECORDS[1]], path) is None  # one density
    assert plot_roofline([record("ours", flops=None)], path) is None
    assert plot_roofline([record("ours", ceilings=None)], path) is None
    assert plot_speedups([RECORDS[0], RECORDS[4]], path) is None
    assert not path.exists()


class Axes:
    """Remembers what was drawn."""

    def __init__(self):
        self.drawn = []

    def __getattr__(self, name):
        if name in ("xaxis", "yaxis"):
            return self
        if name == "spines":
            return {side: self for side in ("top", "right")}

        def call(*arguments, **words):
            self.drawn.append((name, arguments, words))

        return call

    def of(self, name):
        return [(arguments, words) for n, arguments, words in self.drawn if n == name]


@pytest.fixture
def axes(monkeypatch):
    axes = Axes()

    class Figure:
        def add_subplot(self, *place):
            return axes

    monkeypatch.setattr(plots, "blank_figure", lambda wide, high, dpi: Figure())
    monkeypatch.setattr(plots, "write_png", lambda figure, path: None)
    return axes


def test_speed_against_density_is_the_inverse_of_the_ratio(axes):
    plot_density(RECORDS, "x.png")
    ours, gather = axes.of("errorbar")
    assert ours[0] == ([0.01, 0.1], [2.0, 2.0])
    assert ours[1]["yerr"] == [[0.75] * 2, [0.5] * 2]  # to 1 / 0.8 and 1 / 0.4
    assert (ours[1]["label"], gather[1]["label"]) == ("ours", r"gather \$x\$")
    [dense] = axes.of("axhline")
    assert dense[0] == (1.0,)
    assert dense[1]["label"] == "dense"


def test_the_roofline_has_the_measured_ceilings_and_hollow_competitors(axes):
    plot_roofline(RECORDS, "x.png")
    slope, fp32, bf16, ours, others = axes.of("plot")
    assert slope[0][1][1] == pytest.approx(0.2)  # up to the highest product
    assert slope[0][0][1] == pytest.approx(20)  # where 1e10 bytes carry 2e11 operations
    assert fp32[0][0][0] == pytest.approx(10)
    assert fp32[0][1] == pytest.approx([0.1] * 2)
    assert bf16[0][1] == pytest.approx([0.2] * 2)
    assert ours[0][0] == [4.0] * 2
    assert ours[0][1] == pytest.approx([4e-3] * 2)
    assert others[1]["markerfacecolor"] == "none"
    assert ours[1]["markerfacecolor"] != "none"


def test_the_slope_ends_at_the_roof_even_if_all_is_right_of_it(axes):
    plot_roofline(
        [record("ours", flops=4e9)], "x.png"
    )  # 4000 operations a byte; the ridge is at 10
    slope, fp32, _ = axes.of("plot")
    assert slope[0][0][0] < slope[0][0][1] == pytest.approx(10)
    assert slope[0][1][0] < slope[0][1][1] == pytest.approx(0.1)
    assert fp32[0][0][1] > 4000


def test_operations_that_some_skip_are_said_to_be_the_dense_form_s(axes):
    plot_roofline([record("ours")], "x.png")
    facts = {"operations": "those of the dense product, for everyone"}
    plot_roofline([record("ours", case_facts=facts)], "x.png")
    labels = [arguments[0] for arguments, _ in axes.of("set_ylabel")]
    assert labels == ["TFLOP/s", "TFLOP/s, counted as in the dense form"]


def test_bars_start_at_the_baseline(axes):
    plot_speedups([*RECORDS, record("slow", ratio=dict.fromkeys(SPREAD, 4.0))], "x.png")
    [(arguments, words)] = axes.of("barh")
    assert list(arguments[0]) == [0, 1, 2]
    assert arguments[1] == [1.0, 1.0, -0.75]
    assert words["left"] == 1.0
    [(labels, _)] = axes.of("set_yticks")
    assert labels[1] == [f"add/8x8/fp32: {name}" for name in ("ours, 1%", "ours, 10%", "slow")]
