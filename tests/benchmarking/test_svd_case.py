"""The cases around the truncated SVD: contenders are right, and a wrong one has no speed."""

from __future__ import annotations

import pytest
import torch

from sparseft.benchmarking.cases import denoise, residual, truncated_svd
from sparseft.benchmarking.suite import run_suite

TEN = (0.1,)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setenv("SPARSEFT_BENCH_COMPILE", "0")


def run_one(case):
    [result] = run_suite([case], "cpu", rounds=2)
    return result, {row["name"]: row for row in result["contenders"]}


def test_the_loops_are_timed_with_their_residuals():
    result, rows = run_one(denoise.denoise_case((1, 72, 2), TEN, "fp32"))
    assert result["status"] == "ok", result
    assert all("clocks" in row for row in rows.values())
    assert rows[denoise.FULL]["facts"]["residual over the least"] == pytest.approx(1, abs=1e-5)
    assert 1 <= rows[denoise.LOWRANK]["facts"]["residual over the least"] < 1.1
    assert rows[f"{denoise.OURS}, 10%"]["checks"][1]["got"] <= 1.01


def test_what_factors_leave_is_measured_in_fp64():
    x = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(0))
    best = truncated_svd.least_left_over(x, 4)
    for cut in (truncated_svd.cut_full, truncated_svd.cut_lowrank):
        found = truncated_svd.left_over(x, cut(x, 4))
        assert found.tolist() == pytest.approx(best, rel=1e-4)
    whole = truncated_svd.left_over(x, truncated_svd.cut_full(x, 9))
    assert float(whole.max()) < 1e-4 * best[0]


def test_operations_are_known_where_products_are_counted():
    assert truncated_svd.block_flops([(768, 768)], 64) == 2 * 768 * 768 * 80 * 6
    assert truncated_svd.block_flops([(768, 768), (40, 40)], 64) is None  # decomposed whole


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


prune_residual_ = residual.prune_residual_


@pytest.mark.parametrize("wrong", [shifted, one_less, others])
def test_a_wrong_pruning_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(residual, "prune_residual_", wrong)
    result, rows = run_one(residual.prune_case((2, 20, 30, 3), TEN, "fp32"))
    assert result["status"] == "red"
    assert "clocks" not in rows["prune_residual_, 10%"]
    assert "clocks" in rows["torch, 10%"]


def test_a_denoise_that_keeps_other_counts_is_not_timed(monkeypatch):
    def nothing_kept(pairs, how):
        return [(name, torch.zeros_like(x)) for name, x, _ in pairs]

    monkeypatch.setattr(denoise, "denoised", nothing_kept)
    result, rows = run_one(denoise.denoise_case((1, 24, 2), TEN, "fp32"))
    assert result["status"] == "red"
    assert "clocks" not in rows[f"{denoise.OURS}, 10%"]
