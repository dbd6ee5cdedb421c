"""The harness: alternation, ratios, results that say where they come from."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft.benchmarking import (
    Comparison,
    StepCase,
    alternate,
    markdown_table,
    measure_step,
    results_folder,
    training_step,
    write_results,
)
from sparseft.benchmarking import results as results_module


def test_sides_take_turns_and_swap_order():
    calls = []
    comparison = alternate(lambda: calls.append("b"), lambda: calls.append("o"), rounds=3, warmup=1)
    assert "".join(calls) == "bo" + "bo" + "ob" + "bo"
    assert len(comparison.baseline) == len(comparison.ours) == 3


def test_the_ratio_is_taken_round_by_round():
    """A round in which the whole machine was three times slower must not move the ratio."""
    comparison = Comparison(baseline=(1.0, 3.0, 1.0), ours=(0.5, 1.5, 0.5))
    assert comparison.ratios == (0.5, 0.5, 0.5)
    assert comparison.summary()["ratio"]["median"] == 0.5
    assert comparison.summary()["baseline_seconds"]["min"] == 1.0


def test_bad_requests_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="rounds=1"):
        alternate(list, list, rounds=1)
    with pytest.raises(ValueError, match=r"clock='sun'.*wall, cpu"):
        alternate(list, list, rounds=2, clock="sun")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="needs one thread"):
        alternate(list, list, rounds=2, clock="cpu")


def test_results_of_a_dirty_tree_go_to_scratch(monkeypatch, tmp_path):
    for state, passed, scratch in (
        ({"sha": "a", "dirty": False}, True, False),
        ({"sha": "a", "dirty": True}, True, True),
        ({"sha": "a", "dirty": False}, False, True),
        (None, True, True),
    ):
        monkeypatch.setattr(results_module, "git_state", lambda state=state: state)
        folder = results_folder(tmp_path, passed=passed)
        assert (folder.name == "scratch") is scratch


def test_written_results_carry_provenance(tmp_path):
    table = markdown_table([{"a": 1, "b": "x"}], {"a": "first", "b": "second"})
    assert table == "| first | second |\n|---|---|\n| 1 | x |\n"
    path = write_results(tmp_path / "new", "demo", {"cases": [1]}, table)
    document = json.loads(path.read_text())
    assert document["cases"] == [1]
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    assert document["provenance"]["hardware"]["cpu"]
    assert document["provenance"]["machine"]["threads"] == torch.get_num_threads()
    assert path.with_suffix(".md").read_text() == table


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(training_step, "MODEL", "encoder:2x16x90")


@pytest.mark.parametrize("task", ["classification", "mlm"])
@pytest.mark.parametrize("optimizer", ["torch", "sparse"])
def test_a_step_case_checks_then_measures(tiny, task, optimizer):
    case = StepCase(task=task, batch=2, length=8, density=0.1, optimizer=optimizer)
    result = measure_step(case, rounds=2, warmup=0)
    assert result["passed"], result["largest_weight_difference"]
    assert result["bytes_per_trained_entry"] == 24  # index, base, diff, gradient, two moments
    assert result["state_ratio"] == pytest.approx(2 * 0.1, rel=0.1)
    json.dumps(result)


def test_a_side_that_trains_something_else_is_caught(tiny, monkeypatch):
    """The gate must be able to fail: here the competitor forgets its masks."""
    real = training_step.build

    def forgetful(workload, way, device):
        side = real(workload, way, device)
        side.masks = {name: torch.ones_like(mask) for name, mask in side.masks.items()}
        return side

    monkeypatch.setattr(training_step, "build", forgetful)
    result = measure_step(StepCase(batch=2, length=8, density=0.1), rounds=2, warmup=0)
    assert not result["passed"]
