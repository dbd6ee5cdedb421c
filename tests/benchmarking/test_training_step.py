"""The table of a step against a gradient mask: its gate, its bytes, its times."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft.benchmarking import StepCase, measure_step, training_step


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
    assert result["rounds"] == len(result["samples"]["ours"]) == 2
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
