"""What a time is divided by: one that does the same work at the same density."""

from __future__ import annotations

import statistics

import pytest

from sparseft.benchmarking.cases import OPS
from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.suite import Case, Contender, Prepared, run_suite
from sparseft.benchmarking.suite_report import suite_markdown


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")


def held_against(**contenders):
    case = Case("x", lambda device: Prepared(contenders, next(iter(contenders)), warmup=0))
    [result] = run_suite([case], "cpu", rounds=2)
    return {row["name"]: row["against"] for row in result["contenders"]}


def side(density=None, work="", **more):
    return Contender(list, density=density, work=work, **more)


def test_a_ratio_is_of_the_same_density():
    found = held_against(
        theirs_1=side(0.01),
        ours_1=side(0.01, ours=True),
        theirs_10=side(0.1),
        ours_10=side(0.1, ours=True),
        dense=side(),
        ours_50=side(0.5, ours=True),
    )
    assert found == {
        "theirs_1": "theirs_1",
        "ours_1": "theirs_1",
        "theirs_10": "theirs_10",
        "ours_10": "theirs_10",
        "dense": "theirs_1",
        "ours_50": "dense",
    }


def test_a_ratio_is_of_the_same_work():
    found = held_against(
        dense_sum=side(work="sum"),
        ours_sum=side(0.1, "sum", ours=True),
        dense_ties=side(work="TIES"),
        ours_ties=side(0.1, "TIES", ours=True),
        ours_alone=side(0.1, "DARE", ours=True),
    )
    assert found == {
        "dense_sum": "dense_sum",
        "ours_sum": "dense_sum",
        "dense_ties": "dense_ties",
        "ours_ties": "dense_ties",
        "ours_alone": None,
    }


def test_who_was_not_timed_is_no_measure():
    found = held_against(
        a=side(), b=side(work="w", skipped="absent"), c=side(work="w"), d=side(work="w", ours=True)
    )
    assert found["d"] == "c"


@pytest.mark.parametrize("op", ["combine", "topk_single"])
def test_rows_of_a_case_are_held_against_their_like(op):
    bench = OPS[op]
    case = bench.case(bench.shapes["tiny"][0], (0.01, 0.1), "fp32")
    [result] = run_suite([case], "cpu", rounds=2, case_seconds=0.1)
    rows = {row["name"]: row for row in result["contenders"]}
    for row in rows.values():
        if row["ours"]:
            other = rows[row["against"]]
            assert not other["ours"]
            assert other["work"] == row["work"]
            assert other["density"] in (None, row["density"])
            samples = zip(
                row["clocks"]["device"]["samples"],
                other["clocks"]["device"]["samples"],
                strict=True,
            )
            median = statistics.median(mine / theirs for mine, theirs in samples)
            assert row["clocks"]["device"]["ratio"]["median"] == pytest.approx(median)


def test_the_report_names_another_baseline_but_not_to_itself():
    contenders = {
        "sum": Contender(list, work="sum"),
        "TIES": Contender(list, work="TIES"),
        "ours, TIES": Contender(list, work="TIES", ours=True),
    }
    case = Case("x", lambda device: Prepared(contenders, "sum", warmup=0))
    text = suite_markdown(run_suite([case], "cpu", rounds=2), {})
    assert text.count(" of TIES") == 1
    [row] = [line for line in text.splitlines() if line.startswith("| ours, TIES")]
    assert ") of TIES |" in row
