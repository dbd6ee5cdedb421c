"""The training step against every other way to train: who takes part, gates, targets, memory."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sparseft.benchmarking.cases import training_gates
from sparseft.benchmarking.cases import training_step as cases
from sparseft.benchmarking.cases.training_step import (
    BENCHES,
    DENSE,
    FROZEN,
    memory_target,
    name_of,
    step_case,
)
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Contender, run_suite
from sparseft.profiling import Way

TINY = (1, 16, 40, 1, 4)


def run(case, **options):
    [result] = run_suite([case], "cpu", rounds=2, case_seconds=0.1, **options)
    return result


def rows_of(result):
    return {row["name"]: row for row in result["contenders"]}


@pytest.fixture(scope="module")
def classification():
    return run(step_case("classification", TINY, (0.05, 0.2)))


def test_every_way_takes_part(classification):
    assert classification["status"] == "ok", classification
    rows = rows_of(classification)
    assert classification["baseline"] == DENSE
    for density, percent in ((0.05, "5%"), (0.2, "20%")):
        for kind in (
            "ours, {}",
            "gradient mask, {}",
            "LoRA, as many as {}",
            "SHiRA, as many as {}",
        ):
            row = rows[kind.format(percent)]
            assert row["density"] == density
            assert row["ours"] is kind.startswith("ours")
            assert row["clocks"]["wall"]["ratio"]["median"] > 0
    ours = rows["ours, 20%"]["facts"]
    for other in ("gradient mask, 20%", "LoRA, as many as 20%", "SHiRA, as many as 20%"):
        assert rows[other]["facts"]["trained"] == pytest.approx(ours["trained"], rel=0.03)
    assert rows[FROZEN]["facts"]["trained"] == 0


def test_peaks_are_of_the_side_alone(classification):
    peaks = {name: row["facts"]["peak MB"] for name, row in rows_of(classification).items()}
    weights = rows_of(classification)[DENSE]["facts"]["trained"] * 4 / 1e6
    assert peaks[DENSE] > 4 * weights  # weights, gradients, two moments
    assert weights < peaks[FROZEN] < peaks["ours, 5%"] < peaks["ours, 20%"] < peaks[DENSE]
    assert peaks["gradient mask, 5%"] > peaks["ours, 5%"]


def test_ours_shows_gradients_weights_and_agreement(classification):
    names = [check["name"] for check in rows_of(classification)["ours, 5%"]["checks"]]
    assert any(name.startswith("gradient of") for name in names)
    assert any("entries that differ" in name for name in names)
    assert any("distance from masked dense" in name for name in names)
    assert rows_of(classification)["LoRA, as many as 5%"]["checks"][0]["got"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES, ids=lambda b: b.name)
def test_the_tiny_shape_of_each_task(bench):
    [shape] = bench.shapes["tiny"]
    result = run(bench.case(shape, (0.1,), "bf16"))
    assert result["status"] == "ok", result
    assert result["op"] == bench.name
    assert rows_of(result)["ours, 10%"]["checks"]


def test_a_side_that_trains_other_entries_is_red(monkeypatch):
    real = training_gates.build

    def forgetful(workload, way, device):
        side = real(workload, way, device)
        side.masks = {name: torch.ones_like(mask) for name, mask in side.masks.items()}
        return side

    monkeypatch.setattr(training_gates, "build", forgetful)
    result = run(step_case("causal", TINY, (0.1,)))
    row = rows_of(result)["ours, 10%"]
    assert result["status"] == row["status"] == "red"
    assert "distance from masked dense" in row["reason"]
    assert "clocks" not in row


def test_adapters_that_start_elsewhere_are_red(monkeypatch):
    pytest.importorskip("peft", reason="PEFT is not installed")
    real = training_gates.build

    def shifted(workload, way, device):
        side = real(workload, way, device)
        if way.kind == "lora":
            for name, parameter in side.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=5.0)
        return side

    monkeypatch.setattr(training_gates, "build", shifted)
    rows = rows_of(run(step_case("causal", TINY, (0.1,))))
    assert rows["LoRA, as many as 10%"]["status"] == "red"
    assert rows["ours, 10%"]["status"] == rows["SHiRA, as many as 10%"]["status"] == "ok"


def test_adapters_need_peft(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    result = run(step_case("causal", TINY, (0.1,)))
    rows = rows_of(result)
    assert result["status"] == "ok"
    for name in ("LoRA, as many as 10%", "SHiRA, as many as 10%"):
        assert rows[name]["status"] == "skipped"
        assert "sparseft[bench]" in rows[name]["reason"]


def test_the_targets_are_those_that_were_set():
    assert cases._targets("classification", (1, 16, 40, 32, 128), (0.01,), "bf16") == ()
    assert cases._targets("mlm", (*cases.XLMR, 32, 128), (0.01,), "bf16") == ()
    gpu = cases._targets("classification", (*cases.XLMR, 32, 128), (0.01,), "bf16")
    assert [target.limit for target in gpu] == [1.15, 0.7, 1.0, 30.0]
    assert all(target.devices == ("cuda",) for target in gpu)
    names = {name_of(way) for way in cases._ways((0.01,), True)}
    timing = Timing("wall", {name: [1.0, 1.0] for name in names})
    assert all(target.measure(timing, {}) == 1.0 for target in gpu[:3])
    [cpu] = cases._targets("classification", (12, 384, 25_000, 16, 64), (0.001, 0.01), "fp32")
    assert (cpu.limit, cpu.devices) == (0.746, ("cpu",))
    assert cpu.measure(timing, {}) == 1.0


def test_the_memory_target_is_per_trained_entry():
    target = memory_target(0.01)
    sides = {
        name_of(Way("attached", 0.01)): Contender(list, facts={"peak MB": 110.0, "nnz": 1_000_000}),
        name_of(Way("lora", 0.01)): Contender(list, facts={"peak MB": 100.0}),
    }
    judged = target.judge(Timing("wall"), sides)
    assert judged["measured"] == pytest.approx(10.0)
    assert judged["met"] is True
    sides[name_of(Way("lora", 0.01))].facts.clear()
    assert target.judge(Timing("wall"), sides)["met"] is None


@pytest.mark.parametrize(
    ("shape", "densities", "dtype", "says"),
    [
        ((1, 16, 40, 1), (0.1,), "fp32", "has 4 numbers; wanted LAYERSxHIDDEN"),
        ((1, 16, 40, 0, 4), (0.1,), "fp32", "BATCH of shape"),
        (TINY, (0.0,), "fp32", r"density is 0.0; wanted a number in \(0, 1\]"),
        (TINY, (0.1,), "fp16", "dtype is 'fp16'; wanted one of fp32, bf16"),
    ],
)
def test_bad_input(shape, densities, dtype, says):
    with pytest.raises(ValueError, match=says):
        step_case("mlm", shape, densities, dtype).build(torch.device("cpu"))


def test_too_large_for_this_machine():
    result = run(step_case("mlm", (100, 65536, 10**6, 8, 128), (0.1,)))
    assert result["status"] == "skipped"
    assert "needs" in result["reason"]


def test_a_leaf_of_few_entries_is_not_gated_by_luck():
    """Torch happens to be exact at a small entry: a rounding or two of ours is no mistake there,
    and one among many is."""
    exact = torch.linspace(0.01, 1.0, 100, dtype=torch.float64)
    theirs, everywhere, few = exact.float(), torch.arange(100), torch.tensor([0])

    def passes(factor, at):
        ours = exact.float()[at] * factor
        return training_gates._gradient_check("weight", ours, theirs, exact, at).passed

    assert passes(1 + 4e-7, few)
    assert not passes(1.001, few)
    assert passes(1.0, everywhere)
    assert not passes(1 + 4e-7, everywhere)
    nothing, zeros = torch.zeros(1), torch.zeros(100)
    check = training_gates._gradient_check
    assert check("weight", nothing, zeros, zeros.double(), few).passed
    assert not check("weight", nothing + 1e-6, zeros, zeros.double(), few).passed
