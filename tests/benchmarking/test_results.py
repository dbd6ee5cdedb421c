"""Result files: where they go, and what made them."""

from __future__ import annotations

import json

import torch

from sparseft.benchmarking import markdown_table, results_folder, write_results
from sparseft.benchmarking import results as results_module


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
