"""JSON lines: complete by themselves, strict, and refused by line number when broken."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from sparseft.benchmarking import records as module
from sparseft.benchmarking.ceilings import Ceilings
from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.records import (
    append_records,
    dump_lines,
    made_by,
    make_records,
    read_records,
)
from sparseft.benchmarking.suite import Case, Contender, Prepared, run_suite
from sparseft.errors import DataError, OptionError

CEILINGS = Ceilings(copy=1e10, gemm={"fp32": 1e12}, sizes={"copy": 1, "fp32": 2})


def run_adding(adding, **options):
    case = adding(**options).case((8, 8), (0.01,), "fp32")
    return run_suite([case], "cpu", rounds=3, ceilings=CEILINGS)


def test_a_line_has_all_that_was_measured_and_what_made_it(adding):
    theirs, ours = make_records(run_adding(adding), made_by("cpu"), CEILINGS)
    assert (ours["op"], ours["shape"], ours["dtype"]) == ("adding", [8, 8], "fp32")
    assert (ours["case"], ours["contender"], ours["baseline"]) == (
        "adding/8x8/fp32",
        "ours, 1%",
        "2 * a",
    )
    assert (ours["density"], ours["ours"], ours["status"], ours["clock"]) == (
        0.01,
        True,
        "ok",
        "wall",
    )
    assert len(ours["samples"]) == 3
    assert ours["min"] <= ours["quartile1"] <= ours["median"] <= ours["quartile3"]
    assert theirs["ratio"]["median"] == 1.0
    assert ours["checks"] == [
        {"name": "sum: entries that differ", "got": 0.0, "limit": 0.0} | {"passed": True}
    ]
    assert ours["GB/s"] == pytest.approx(512 / ours["median"] * 1e-9)
    assert ours["% of copy"] == pytest.approx(100 * ours["GB/s"] / 10)
    assert ours["% of GEMM"] == pytest.approx(100 * ours["TFLOP/s"])
    assert ours["ceilings"] == {"copy": 1e10, "gemm": {"fp32": 1e12}, "sizes": CEILINGS.sizes}
    made = ours["provenance"]
    assert made["versions"]["torch"] == torch.__version__
    assert made["machine"]["threads"] == torch.get_num_threads()
    assert made["hardware"]["cpu"]
    assert made["seed"] == 0
    assert made["measured_at"].endswith("+00:00")
    assert {"git", "device"} <= set(made)


def test_wrong_and_skipped_ones_are_lines_without_times(adding):
    [_, red] = make_records(run_adding(adding, wrong=True), made_by("cpu"))
    assert red["status"] == "red"
    assert "entries that differ: 64, at most 0" in red["reason"]
    assert red["median"] is red["samples"] is None
    skipped = {"name": "x/1/fp32", "status": "skipped", "reason": "needs 3 GiB"}
    [line] = make_records([skipped], made_by("cpu"))
    assert (line["contender"], line["reason"], line["case"]) == (None, "needs 3 GiB", "x/1/fp32")


def test_not_a_number_is_written_as_text(tmp_path):
    failed = Contender(list, [Check("error", float("nan"), 1.0)], {"worst": float("inf")})
    results = run_suite([Case("x", lambda d: Prepared({"a": failed}, "a"))], "cpu", rounds=2)
    append_records(tmp_path / "x.jsonl", make_records(results, made_by("cpu")))
    [line] = read_records(tmp_path / "x.jsonl")
    assert line["checks"][0]["got"] == "nan"
    assert line["facts"]["worst"] == "inf"


def test_lines_are_added_to_a_file(adding, tmp_path):
    path = tmp_path / "new" / "all.jsonl"
    lines = make_records(run_adding(adding), made_by("cpu"), CEILINGS)
    append_records(path, [])
    assert read_records(path) == []
    append_records(path, lines)
    append_records(path, lines[:1])
    assert read_records(path) == json.loads(json.dumps([*lines, lines[0]]))


def test_what_is_no_file_takes_lines_too():
    append_records(os.devnull, [{"case": "x"}])


def test_a_file_with_a_cut_off_line_gets_no_more(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text('{"case": "x"')
    with pytest.raises(OptionError, match="last line is cut off"):
        append_records(path, [])
    assert path.read_text() == '{"case": "x"'


def test_a_full_disk_leaves_no_half_line(adding, tmp_path, monkeypatch):
    path = tmp_path / "all.jsonl"
    lines = make_records(run_adding(adding), made_by("cpu"))
    append_records(path, lines)
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(module.os, "write", lambda handle, data: write(handle, data[:50]))
    with pytest.raises(OSError, match="No space") as caught:
        append_records(path, lines)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: list, wanted an object"),
        ('{"case": "x", "status": "ok"}', "line 2: 'provenance' is missing"),
        ('{"case": 3, "status": "ok", "provenance": {}}', "line 2: 'case' is 3, wanted str"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(adding, tmp_path, line, message):
    path = tmp_path / "all.jsonl"
    good = dump_lines(make_records(run_adding(adding), made_by("cpu"))[:1])
    path.write_text(f"{good}{line}\n")
    with pytest.raises(DataError, match=message):
        read_records(path)
