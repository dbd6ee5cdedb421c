"""Cases of diffs kept apart: every side gives the layer's result, and a wrong one has no speed."""

from __future__ import annotations

import pytest
import torch

from sparseft.benchmarking.cases import spmm, spmm_embedding
from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.suite import run_suite

CASES = {"spmm": (spmm, (33, 20, 5, 3, 2)), "spmm_embedding": (spmm_embedding, (50, 20, 5, 3, 2))}


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")


def run_one(name, densities=(0.01, 0.2), dtype="bf16"):
    module, shape = CASES[name]
    [result] = run_suite([module.BENCH.build(shape, densities, dtype)], "cpu", rounds=2)
    return result, {row["name"]: row for row in result["contenders"]}


@pytest.mark.parametrize("name", CASES)
def test_all_sides_are_right_and_timed(name):
    module, _ = CASES[name]
    result, rows = run_one(name)
    assert result["status"] == "ok", result
    sparse = module.CSR if name == "spmm" else module.COO
    each = {f"{side}, {d}" for side in ("ours", sparse) for d in ("1%", "20%")}
    once = {module.MERGED, module.DENSE, module.ROWS}
    assert set(rows) == each | once | {f"compiled: {module.DENSE}"}
    for row_name in each | once:
        assert "clocks" in rows[row_name]
        assert all(check["passed"] for check in rows[row_name]["checks"])
    assert rows["ours, 1%"]["facts"]["groups"] == 2
    assert rows[f"compiled: {module.DENSE}"]["status"] == "skipped"


@pytest.mark.parametrize(("name", "op"), [("spmm", "spmm"), ("spmm_embedding", "embedding_diff")])
def test_a_wrong_result_is_not_timed(monkeypatch, name, op):
    module, _ = CASES[name]
    real = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *a, **k: real(*a, **k).roll(1, 0))
    result, rows = run_one(name)
    assert result["status"] == "red"
    assert "clocks" not in rows["ours, 20%"]
    assert "clocks" in rows[module.DENSE]


def test_bytes_and_operations_of_a_layer_by_hand():
    # 3 x 5 weight and 4 rows of 2 positions in 2 bytes; diffs of 6 and 2 entries on 3 rows and 1
    moved, flops = spmm.counts((3, 5), [3, 1], [6, 2], 2, 2)
    assert moved == 2 * (15 + 8 * 8) + 8 * 8
    assert flops == 2 * (8 * 15 + 2 * (3 * 6 + 1 * 2))


def test_bytes_of_a_lookup_by_hand(monkeypatch):
    masks = {
        0: torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        1: torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]),
    }
    monkeypatch.setattr(
        spmm_embedding,
        "random_pattern",
        lambda shape, density, *, device, seed: (
            spmm_embedding.SparseDiff.from_dense(masks[seed].float()).pattern
        ),
    )
    ids = torch.tensor([[0, 1], [2, 2], [1, 1]])  # rows 0 and 2 have the first diff
    side = spmm_embedding._Sides(
        torch.randn(3, 4), ids, 0.5, 2, torch.Generator().manual_seed(0)
    )  # fmt: skip
    plain = 6 * (8 + 2 * 16)
    assert side.looked_up == plain
    assert side.bytes == plain + 8 * ((2 + 1) + 1)


@pytest.mark.parametrize("name", CASES)
def test_more_groups_than_rows_are_refused(name):
    module, shape = CASES[name]
    with pytest.raises(ValueError, match=f"{name}: 9 groups of 5 rows"):
        module.BENCH.build((*shape[:4], 9), (0.01,), "bf16")
