"""`run.py ranks`: what it keeps, what it calls a fault, what the page shows of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
SENT = {"all_reduced": 4000, "all_gathered": 0, "reduce_scattered": 0, "broadcast": 8}
ROW = {
    "label": "attached 1%",
    "trainable": 1000,
    "predicted": {"peak": 2048},
    "measured": {"peak": 2048},
    "not_measured": "",
    "error": 0.0,
    "exchange_predicted": SENT,
    "exchange_measured": SENT,
}
WORK = {"model": "encoder:2x64x500", "task": "mlm"}
FOUND = {"workload": WORK, "world_size": 2, "sharding": "ddp", "rows": [ROW]}


def loaded(name):
    if str(HERE) not in sys.path:  # as each of the scripts does for the others
        sys.path.append(str(HERE))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"error": 0.019}, []),
        ({"error": -0.03}, ["peak predicted -3.0% off"]),
        ({"exchange_measured": {**SENT, "all_reduced": 4004}}, ["other bytes than predicted"]),
        ({"measured": None, "not_measured": "killed"}, ["not measured: killed"]),
    ],
    ids=["as predicted", "near", "far", "bytes", "none"],
)
def test_faults(change, said):
    found = copy.deepcopy(FOUND)
    found["rows"][0] |= change
    faults = loaded("run_ranks").faults(found)
    assert len(faults) == len(said)
    assert all(text in fault for text, fault in zip(said, faults, strict=True))


def test_predictions_of_several_ranks_are_one_result(tmp_path):
    options = ["--model", "--large", "tiny-decoder", "--paper-ranks", "1", "2", "--density", "0.1"]
    options += ["--ways", "attached", "--out", str(tmp_path), "--name", "one"]
    assert loaded("run_ranks").main(options, results=tmp_path) == 0
    document = json.loads((tmp_path / "one.json").read_text())
    kinds = [(found["sharding"], found["world_size"]) for found in document["paper"]]
    assert kinds == [("ddp", 1), ("ddp", 2), ("fsdp", 2)]
    (tmp_path / "two.json").write_text(json.dumps({"measured": [FOUND]}))
    page = loaded("page").Page(tmp_path)
    paper = page.fill("{{paper? one.json none.json}}").splitlines()
    assert [line.split(" | ")[0] for line in paper[2:]] == [
        "| tiny-decoder ddp",
        "| tiny-decoder fsdp",
    ]
    assert paper[2].split(" | ")[3] == paper[3].split(" | ")[3], "one rank is one rank"
    measured = page.fill("{{ranks two.json}}").splitlines()
    assert measured[-1].endswith("| 2.0 KiB | 2.0 KiB | +0.00 % | 4,000 | - | - | 8 | yes |")
