"""Rows, reasons, limits, table, JSON and picture of a profile; the figures come from stand-ins."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from sparseft.errors import DataError, OptionError
from sparseft.profiling import profiles
from sparseft.profiling.fits import GRID, largest_densities
from sparseft.profiling.measure import Measurement
from sparseft.profiling.memory import MemoryUse
from sparseft.profiling.plot import plot_profile
from sparseft.profiling.predict import Prediction
from sparseft.profiling.profiles import profile
from sparseft.profiling.report import (
    fit_line,
    label_of,
    lines_above,
    notes_below,
    profile_json,
    profile_table,
)
from sparseft.profiling.worker import NotMeasuredError
from sparseft.profiling.workload import Unavailable, Way, Workload

MIB = 1 << 20
WORK = Workload(model="tiny-encoder")


def use_of(way, scale=MIB):
    per = int(100 * scale * (way.density or 0))
    return MemoryUse(
        weights=100 * scale,
        diff=per,
        gradients=per,
        optimizer=2 * per,
        activations=30 * scale,
        temporary=5 * scale,
    )


@pytest.fixture
def stand_ins(monkeypatch):
    """Predictions and measurements that cost nothing; ``fail`` says which ways raise what."""
    fail: dict[tuple[str, str], Exception] = {}
    calls = []

    def predict(workload, way, device="cpu", world_size=1, sharding="fsdp"):
        if ("predict", way.kind) in fail:
            raise fail["predict", way.kind]
        return Prediction(use=use_of(way, 1000 * MIB), trainable=int(1e6 * way.share))

    def measure(workload, way, device="cpu", *, steps=5, threads=None):
        calls.append(way)
        if ("measure", way.kind) in fail:
            raise fail["measure", way.kind]
        seconds = {"median": 0.25, "quartile1": 0.2, "quartile3": 0.3, "min": 0.1}
        return Measurement(
            use=use_of(way, 1024 * MIB),
            trainable=int(1e6 * way.share),
            seconds=seconds,
            steps=steps,
            tokens_per_second=4096.0,
            how="stand-in",
        )

    monkeypatch.setattr(profiles, "predict", predict)
    monkeypatch.setattr(profiles, "measure", measure)
    monkeypatch.setattr(profiles, "too_little", lambda needed, device: "")
    return fail, calls


def test_rows_are_ways_by_density(stand_ins):
    found = profile(WORK, [1.0, 0.1, 0.01, 0.1])
    assert [label_of(row.way) for row in found.rows] == [
        "attached 1%",
        "LoRA = 1%",
        "attached 10%",
        "LoRA = 10%",
        "attached 100%",
        "dense",
        "frozen",
    ]
    assert {round(row.error, 4) for row in found.rows} == {round(1000 / 1024 - 1, 4)}
    assert found.how == "stand-in"


def test_one_way_that_fails_leaves_the_others(stand_ins):
    fail, _ = stand_ins
    fail["measure", "lora"] = NotMeasuredError("out of memory: asked for 3 GiB more")
    fail["predict", "shira"] = Unavailable("no backward on fake tensors")
    fail["predict", "dense"] = ZeroDivisionError("a fault of ours\nwith a second line")
    found = profile(WORK, [0.1], ways=["attached", "lora", "shira", "dense"])
    rows = {row.way.kind: row for row in found.rows}
    assert rows["attached"].predicted is not None
    assert rows["attached"].measured is not None
    assert rows["lora"].predicted is not None
    assert rows["lora"].not_measured.startswith("out of memory")
    assert rows["shira"].not_predicted == "no backward on fake tensors"
    assert rows["shira"].measured is not None
    assert rows["dense"].not_predicted == "ZeroDivisionError: a fault of ours"
    notes = notes_below(found)
    assert any(n.endswith("asked for 3 GiB more") and n.startswith("[") for n in notes)
    table = profile_table(found)[1]
    number = next(n for n in notes if "3 GiB" in n).split("]")[0] + "]"
    assert sum(number in row for row in table) == 1


def test_too_little_memory_is_said_with_both_numbers(stand_ins, monkeypatch):
    _, calls = stand_ins
    asked = []

    def too_little(needed, device):
        asked.append(needed)
        return "needs 999 GiB of memory; cpu has 1 GiB" if len(asked) == 2 else ""

    monkeypatch.setattr(profiles, "too_little", too_little)
    found = profile(WORK, [0.1], ways=["attached", "dense"])
    assert asked == [row.predicted.peak for row in found.rows]
    assert [row.measured is None for row in found.rows] == [False, True]
    assert found.rows[1].not_measured == "needs 999 GiB of memory; cpu has 1 GiB"
    assert calls == [Way("attached", 0.1)]


@pytest.mark.parametrize(
    ("work", "options", "reason"),
    [
        (WORK, {"predict_only": True}, "predictions only"),
        (Workload(model="tiny-encoder", base="4bit"), {}, "base of 4bit"),
        (WORK, {"world_size": 9}, "9 ranks are predicted only: at most 8 processes"),
        (Workload(model="7b"), {}, "--large"),
    ],
    ids=["asked", "quantised", "ranks", "large"],
)
def test_what_is_predicted_only_says_why(stand_ins, work, options, reason):
    found = profile(work, [0.1], **options)
    assert not stand_ins[1]
    assert all(reason in row.not_measured for row in found.rows)
    assert len([n for n in notes_below(found) if reason in n]) == 1, "one line for all"
    assert "Nothing measured." in lines_above(found)
    assert len(profile(Workload(model="7b"), [0.1], large=True).rows) == len(stand_ins[1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"densities": [0.0]}, OptionError, "density=0.0"),
        ({"densities": [1.5]}, OptionError, "density=1.5"),
        ({"densities": []}, OptionError, "no density"),
        ({"ways": ["atached"]}, OptionError, "'attached'"),
        ({"ways": []}, OptionError, "gradient_mask"),
        ({"device": "tpu"}, OptionError, "'cpu' or 'cuda'"),
        ({"world_size": 0}, OptionError, "at least one rank"),
        ({"world_size": True}, OptionError, "at least one rank"),
        ({"sharding": "zero"}, OptionError, r"sharding 'zero' is not one of 'fsdp', 'ddp'"),
        ({"fits": ["24 bananas"]}, OptionError, "'24 bananas' is no number of bytes"),
        ({"fits": ["0"]}, OptionError, "hold nothing"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else None,
)
def test_bad_input(stand_ins, arguments, error, match):
    with pytest.raises(error, match=match):
        profile(WORK, **{"densities": [0.1], **arguments})
    assert not stand_ins[1]


def test_cuda_where_there_is_none(stand_ins, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="sees no CUDA device"):
        profile(WORK, [0.1], device="cuda")
    assert profile(WORK, [0.1], device="cuda", predict_only=True).device == "cuda"


def test_bad_models_are_not_rows(stand_ins):
    fail, _ = stand_ins
    fail["predict", "attached"] = DataError("no such model")
    with pytest.raises(DataError, match="no such model"):
        profile(WORK, [0.1])


@pytest.mark.parametrize("limit", [1050, 1001, 1900, 1899, 10_000, 1000, 1007])
def test_the_largest_density_is_the_largest_on_the_grid(limit):
    def peak(density):
        # Convex, with steps as kernels have them.
        return max(1000 + int(90 * density), 900 + int(1000 * density))

    calls = []
    [fit] = largest_densities(lambda d: calls.append(d) or peak(d), [(limit, "so much")])
    fitting = [d for d in GRID if peak(d) <= limit]
    assert fit.density == (max(fitting) if fitting else None)
    assert fit.peak == peak(fit.density or GRID[0])
    assert len(calls) <= 2 + 4 + 10, "halving 541 places"
    asked = len(calls)
    known = {d: peak(d) for d in (0.001, 0.1, 0.123456, 1.0)}
    limits = [(limit, "so much"), (limit, "again")]
    both = largest_densities(lambda d: calls.append(d) or peak(d), limits, known)
    assert [f.density for f in both] == [fit.density] * 2
    assert len(calls) <= 2 * asked, "nothing known is asked for, nor anything twice"
    assert not set(known) & set(calls[asked:])


def test_grid_has_two_digits_and_ends_at_one():
    assert list(GRID) == sorted(set(GRID))
    assert GRID[0] == 1e-6
    assert GRID[-2:] == (0.99, 1.0)
    assert all(float(f"{d:.1e}") == d for d in GRID)


def test_lines_of_limits(stand_ins):
    found = profile(WORK, [0.1], ways=["attached"], predict_only=True, fits=["200 GiB", "1MiB"])
    first, second = map(fit_line, found.fits)
    assert first.startswith("largest density that fits in 200 GiB: 0.17 (predicted peak 1")
    assert second == (
        "largest density that fits in 1MiB: none; with next to nothing trained (density 1e-06) the "
        "model and its activations take 131.8 GiB, 131.8 GiB more than that"
    )


def test_what_a_prediction_rests_on_is_shown(stand_ins, monkeypatch):
    def predict(workload, way, device="cpu", world_size=1, sharding="fsdp"):
        notes = ("CUDA: so and so", *(("8 ranks: all",) if way.kind == "dense" else ()))
        return Prediction(use=use_of(way), trainable=1, assumed=notes)

    monkeypatch.setattr(profiles, "predict", predict)
    found = profile(WORK, [0.1], ways=["attached", "dense"], predict_only=True)
    notes = notes_below(found)
    assert "Assumed: CUDA: so and so." in notes
    assert "Assumed (dense): 8 ranks: all." in notes
    assert profile_json(found)["rows"][1]["assumed"] == ["CUDA: so and so", "8 ranks: all"]


def test_predictions_are_for_the_threads_that_measure(stand_ins, monkeypatch):
    seen = []

    def predict(workload, way, device="cpu", world_size=1, sharding="fsdp"):
        seen.append(torch.get_num_threads())
        return Prediction(use=use_of(way), trainable=1)

    monkeypatch.setattr(profiles, "predict", predict)
    before = torch.get_num_threads()
    profile(WORK, [0.1], ways=["attached"], threads=before + 1, predict_only=True, fits=["1GiB"])
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_code_that_asks_for_values_is_named(stand_ins):
    fail, _ = stand_ins
    fail["predict", "dense"] = DataDependentOutputException(torch.ops.aten.item.default)
    [row] = profile(WORK, ways=["dense"]).rows
    assert row.not_predicted.startswith("its code asks for the values of tensors (aten.item")
    assert row.measured is not None


def test_the_table_fits_a_hundred_columns(stand_ins):
    ways = ["attached", "gradient_mask", "lora", "shira", "dense", "frozen"]
    found = profile(WORK, [0.0005, 0.055, 1.0], ways=ways)
    header, rows = profile_table(found)
    assert lines_above(found)[1].endswith("GiB.")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    assert sum(widths) + len(widths) + 1 <= 100
    predicted, measured = rows[0], rows[1]
    assert predicted[:3] == ["attached 0.05%", "pred.", "97.66"]
    assert measured[:3] == ["  500", "meas.", "100.00"]
    assert measured[-2:] == ["250 ms", "4,096"]
    # Without a measurement a row each, and the counts in a column.
    header, rows = profile_table(profile(WORK, [0.01], ways=["attached"], predict_only=True))
    assert rows == [
        ["attached 1%", "10k", "97.66", "0.98", "0.98", "1.95", "29.30", "4.88", "135.74"]
    ]


def test_json_and_picture(stand_ins, tmp_path):
    fail, _ = stand_ins
    fail["measure", "dense"] = NotMeasuredError("killed")
    found = profile(WORK, [0.01, 0.1], fits=["140GiB"])
    document = json.loads(json.dumps(profile_json(found), allow_nan=False))
    assert document["provenance"]["versions"]["torch"]
    assert document["workload"]["model"] == "tiny-encoder"
    row = document["rows"][0]
    assert row["predicted"]["peak"] == found.rows[0].predicted.peak
    use = found.rows[0].measured
    assert row["measured"] == {**use.parts(), "peak": use.peak}
    assert row["seconds"]["quartile1"] == 0.2
    assert document["fits"][0]["density"] == found.fits[0].density
    assert [r["not_measured"] for r in document["rows"] if r["way"]["kind"] == "dense"] == [
        "killed"
    ]
    pyplot_was = "matplotlib.pyplot" in sys.modules
    plot_profile(found, tmp_path / "bars.png")
    content = (tmp_path / "bars.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was
    plot_profile(found, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == content


def test_every_part_has_its_bar(stand_ins, monkeypatch, tmp_path):
    """The heights of a bar's pieces are the parts, one on the other, in GiB."""
    from matplotlib.axes import Axes

    bars = []
    real = Axes.bar

    def bar(self, x, height, *args, bottom=0.0, **rest):
        bars.append((x, bottom, height, rest["color"], rest["hatch"]))
        return real(self, x, height, *args, bottom=bottom, **rest)

    monkeypatch.setattr(Axes, "bar", bar)
    found = profile(WORK, [0.1], ways=["attached"])
    plot_profile(found, tmp_path / "bars.png")
    assert len(bars) == 12
    assert len({colour for *_, colour, _ in bars}) == 6
    for hatched, use in ((True, found.rows[0].predicted), (False, found.rows[0].measured)):
        mine = [b for b in bars if bool(b[4]) == hatched]
        assert [round(h * 2**30) for _, _, h, _, _ in mine] == list(use.parts().values())
        assert mine[-1][1] + mine[-1][2] == pytest.approx(use.peak / 2**30)


def test_a_step_that_fails_in_this_process_is_a_row_as_well(stand_ins, monkeypatch):
    def fail(workload, way, device, *, steps):
        if way.kind == "dense":
            raise RuntimeError("by hand\nand more")
        return profiles.measure(workload, way, device, steps=steps)

    monkeypatch.setattr(profiles, "measure_here", fail)
    attached, dense = profile(WORK, [0.1], ways=["attached", "dense"], isolated=False).rows
    assert attached.measurement is not None
    assert (dense.measurement, dense.not_measured) == (None, "RuntimeError: by hand")
