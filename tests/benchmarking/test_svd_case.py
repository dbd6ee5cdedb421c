"""The cases around the truncated SVD: contenders are right, and a wrong one has no speed."""

from __future__ import annotations

import pytest
import torch

from sparseft.benchmarking.cases import svd as case_module
from sparseft.benchmarking.cases.svd import FULL, LOWRANK, OURS, denoise_case, prune_case
from sparseft.benchmarking.suite import run_suite


def run_one(case):
    [result] = run_suite([case], "cpu", rounds=2)
    return result, {row["name"]: row for row in result["contenders"]}


def test_the_loops_are_timed_with_their_residuals():
    result, rows = run_one(denoise_case("tiny", ((72, 80), (80, 72)), 2))
    assert result["status"] == "ok", result
    assert all("clocks" in row for row in rows.values())
    assert rows[FULL]["facts"]["residual over the least"] == pytest.approx(1, abs=1e-5)
    assert 1 <= rows[LOWRANK]["facts"]["residual over the least"] < 1.1
    assert rows[OURS]["checks"][1]["got"] <= 1.01


def shifted(matrices, *args):
    return prune_residual_(matrices, *args).mul_(1.001)


def one_less(matrices, left, right, keep):
    return prune_residual_(matrices, left, right, keep - 1)


def others(matrices, left, right, keep):
    """As many, but the first ones."""
    low, kept = left @ right, matrices.clone()
    flat = matrices.copy_(low).view(len(low), -1)
    flat[:, :keep] = kept.view(len(low), -1)[:, :keep]
    return matrices


prune_residual_ = case_module.prune_residual_


@pytest.mark.parametrize("wrong", [shifted, one_less, others])
def test_a_wrong_pruning_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(case_module, "prune_residual_", wrong)
    result, rows = run_one(prune_case(2, (20, 30), 3))
    assert result["status"] == "red"
    assert "clocks" not in rows["prune_residual_"]
    assert "clocks" in rows["torch"]


def test_a_denoise_that_keeps_other_counts_is_not_timed(monkeypatch):
    def nothing_kept(pairs, how):
        return [(name, torch.zeros_like(x)) for name, x, _ in pairs]

    monkeypatch.setattr(case_module, "denoised", nothing_kept)
    result, rows = run_one(denoise_case("tiny", ((20, 30),), 2))
    assert result["status"] == "red"
    assert "clocks" not in rows[OURS]
