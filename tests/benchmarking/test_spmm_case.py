"""The spmm case: every contender gives the layer's result, and a wrong one has no speed."""

from __future__ import annotations

from sparseft.benchmarking.cases import spmm as case_module
from sparseft.benchmarking.cases.spmm import CSR, DENSE, MERGED, OURS, spmm_case
from sparseft.benchmarking.suite import run_suite


def run_one():
    [result] = run_suite([spmm_case((33, 20), 5, 3, 2)], "cpu", rounds=2)
    return result, {row["name"]: row for row in result["contenders"]}


def test_all_contenders_are_right_and_timed():
    result, rows = run_one()
    assert result["status"] == "ok", result
    assert set(rows) == {MERGED, OURS, CSR, DENSE}
    assert all("clocks" in row for row in rows.values())
    assert all(rows[name]["checks"][0]["passed"] for name in (OURS, CSR, DENSE))
    assert rows[OURS]["facts"]["groups"] == 2


def test_a_wrong_product_is_not_timed(monkeypatch):
    real = case_module.spmm
    monkeypatch.setattr(case_module, "spmm", lambda x, *a, **k: real(x.roll(1, 0), *a, **k))
    result, rows = run_one()
    assert result["status"] == "red"
    assert "clocks" not in rows[OURS]
    assert "clocks" in rows[CSR]
