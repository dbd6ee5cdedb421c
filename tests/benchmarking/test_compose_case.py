"""The composition cases: both sides do what they say, and what is wrong is not timed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseft import Adapter, Composer, SparseDiff
from sparseft.benchmarking import compose_cases, suite_cases, suite_source, suite_table
from sparseft.benchmarking.cases import composable_sft as peer
from sparseft.benchmarking.cases import compose, compose_sides, load
from sparseft.benchmarking.cases.compose import COMPILED, DENSE, FIRST, OURS, PEER, PLAIN
from sparseft.benchmarking.cases.compose_sides import Sides, build_model, random_adapters
from sparseft.benchmarking.rotation import Timing
from sparseft.benchmarking.suite import Contender, at_most, faster, run_suite

CPU = torch.device("cpu")
NAMES = [case.name for case in compose_cases("tiny")]
RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setenv("SPARSEFT_BENCH_COMPILE", "0")


def run_one(name, dtype="fp32", **options):
    [result] = run_suite(compose_cases("tiny", dtype), "cpu", only=name, rounds=2, **options)
    return result


def rows_of(result):
    return {row["name"]: row for row in result["contenders"]}


@pytest.fixture
def small_adapter():
    diffs = {
        "a": SparseDiff.from_dense(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, -1.0]])),
        "b": SparseDiff.from_dense(torch.tensor([0.0, 0.5])),
        "c": SparseDiff.from_dense(torch.zeros(2, 2)),
        "d": SparseDiff.from_dense(torch.arange(24.0).view(2, 3, 4)),
    }
    return Adapter(diffs, name="x")


# The competitor.


def test_its_file_counts_columns_first_and_begins_with_a_numpy_integer(small_adapter, tmp_path):
    peer.save(small_adapter, tmp_path / "x.bin")
    with torch.serialization.safe_globals(
        [np.int64(0).__reduce__()[0], np.dtype, type(np.dtype(np.int64))]
    ):
        content = torch.load(tmp_path / "x.bin", weights_only=True)
    entry = content["diffs"]["a"]
    assert entry["index_steps"] == [1, 1, 3]  # 3.0 at 1, 2.0 at 2, -1.0 at 5
    assert entry["values"].tolist() == [3.0, 2.0, -1.0]
    assert isinstance(entry["index_steps"][0], np.int64)
    assert type(entry["index_steps"][1]) is int
    assert content["diffs"]["c"]["index_steps"] == []
    assert content["abs"] == {}


def test_its_file_comes_back_as_coalesced_tensors(small_adapter, tmp_path):
    peer.save(small_adapter, tmp_path / "x.bin")
    loaded, made = peer.load(tmp_path / "x.bin"), peer.as_coo(small_adapter, CPU)
    for name, diff in small_adapter.items():
        for tensor in (loaded[name], made[name]):
            assert tensor.is_coalesced()
            assert torch.equal(tensor.to_dense(), diff.to_dense())
            assert tensor._nnz() == diff.nnz
    assert load._same_content({"x": small_adapter}, {"x": loaded}).passed
    assert not load._same_content({"x": small_adapter}, {"x": loaded | {"a": made["a"] * 2}}).passed


def test_our_converter_reads_its_file(small_adapter, tmp_path):
    peer.save(small_adapter, tmp_path / "pytorch_diff.bin")
    converted = Adapter.load(tmp_path / "pytorch_diff.bin")
    for name, diff in small_adapter.items():
        if diff.nnz:
            assert torch.equal(converted[name].to_dense(), diff.to_dense())


def test_it_adds_with_coefficients_and_subtracts_the_last_first():
    model = torch.nn.Linear(3, 2, bias=False)
    adapters = [
        peer.as_coo(Adapter({"weight": SparseDiff.from_dense(d)}), CPU)
        for d in (torch.eye(2, 3), torch.full((2, 3), 0.5))
    ]
    before = model.weight.detach().clone()
    peer.subtract_and_add(model, {}, {0: 1.0, 1: -0.5}, adapters)
    assert torch.equal(model.weight, (before + torch.eye(2, 3)) - 0.25)
    peer.subtract_and_add(model, {0: 1.0}, {1: 1.0}, adapters)
    wanted = ((before + torch.eye(2, 3)) - 0.25) - torch.eye(2, 3) + 0.5
    assert torch.equal(model.weight, wanted)
    peer.revert(model, {1: 0.5}, adapters)
    assert torch.allclose(model.weight, before)


# The sides.


def test_the_model_has_the_shapes_of_xlmr_base():
    shapes = [p.shape for p in build_model("xlmr_base", torch.device("meta")).parameters()]
    assert len(shapes) == 199
    assert sum(s.numel() for s in shapes) == 278_043_648
    assert torch.Size([250_002, 768]) in shapes


def test_adapters_have_the_density_and_differ():
    shapes = {"w": torch.Size([400, 500]), "b": torch.Size([7])}
    one, other = random_adapters(2, shapes, torch.bfloat16, 0.0276, CPU).values()
    for adapter in (one, other):
        assert adapter["w"].nnz == pytest.approx(0.0276 * 200_000, rel=0.1)
        assert adapter["w"].dtype == torch.bfloat16
        at = adapter["w"].indices
        assert bool((at[1:] > at[:-1]).all())
        assert at.float().mean() == pytest.approx(100_000, rel=0.05)  # all of the tensor
    assert not torch.equal(one["w"].indices, other["w"].indices)
    full = random_adapters(1, {"w": torch.Size([50])}, torch.float32, 1.0, CPU)["adapter0"]
    assert full["w"].nnz == 50


def test_both_models_start_from_the_same_weights_and_drift_is_counted():
    sides = Sides(2, "tiny", "bf16", 0.05, CPU)
    before = {n: p.clone() for n, p in sides.ours.named_parameters()}
    checks, facts = sides.checked([{0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.25}])
    assert all(check.passed for check in checks)
    assert facts["entries changed by going there and back"] > 0
    assert facts["by at most"] > 0
    for name, value in before.items():
        assert torch.equal(sides.theirs.get_parameter(name), value)
        assert torch.equal(sides.ours.get_parameter(name), value)


def test_bytes_are_counted_once_per_entry_and_piece():
    sides = Sides(2, "tiny", "bf16", 1.0, CPU)
    numel = sum(p.numel() for p in sides.ours.parameters())
    pieces = sum(-(-p.numel() // 16) for p in sides.ours.parameters())
    both = {0: 1.0, 1: 1.0}
    assert sides.bytes_applied(both) == numel * (4 + 2 + 1) + 2 * numel * (2 + 1) + 64 * pieces
    assert sides.bytes_restored(both) == numel * (4 + 2) + 64 * pieces


# The cases.


@pytest.mark.parametrize("name", NAMES)
def test_every_case_runs(name):
    result = run_one(name)
    assert result["status"] == "ok", result
    assert result["targets"] == []  # of tiny shapes nothing is asked
    for row in result["contenders"]:
        if row["name"] == COMPILED:
            assert row["status"] == "skipped"
            continue
        assert row["clocks"]["wall"]["seconds"]["median"] > 0
        assert row["checks"]
        assert all(check["passed"] for check in row["checks"])
    json.dumps(result)
    assert f"| {result['name']} | {PEER} |" in suite_table([result], suite_source(CPU))


@pytest.mark.parametrize("which", ["compose/switch2*", "compose/language*", "compose/grid*"])
def test_what_is_timed_is_what_was_checked(which, monkeypatch):
    """Every round ends where it began, or where the next one begins."""
    made = []
    real = compose.Sides

    def remember(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(compose, "Sides", remember)
    assert run_one(which)["status"] == "ok"
    [sides] = made
    active = {int(n.removeprefix("adapter")): c for n, c in sides.composer.active.items()}
    assert (active == {}) == which.startswith("compose/switch")
    sides.composer.revert()
    for _ in (PEER, PLAIN, DENSE):  # each is where ours is
        peer.revert(sides.theirs, active, sides.diffs)
    for name, parameter in sides.ours.named_parameters():
        assert torch.allclose(sides.theirs.get_parameter(name), parameter, atol=1e-6)


def test_loading_leaves_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr(load.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "files"))
    assert run_one("compose/load*")["status"] == "ok"
    assert not (tmp_path / "files").exists()


def spoil_undo(monkeypatch):
    real = Composer.revert

    def revert(self):
        real(self)
        next(self.model.parameters()).data[0, 0] += 1e-3

    monkeypatch.setattr(Composer, "revert", revert)
    return "compose/switch2*", OURS


def spoil_sum(monkeypatch):
    real = Composer.switch

    def switch(self, which, *rest, **options):
        real(self, {name: 0.9 * coeff for name, coeff in which.items()}, *rest, **options)

    monkeypatch.setattr(Composer, "switch", switch)
    return "compose/language*", OURS


def spoil_neighbours(monkeypatch):
    real = Composer.switch

    def switch(self, *arguments, **options):
        real(self, *arguments, **options)
        weight = next(self.model.parameters()).data
        at = set(self[self.names()[0]]["embeddings.word_embeddings.weight"].indices.tolist())
        at |= set(self[self.names()[1]]["embeddings.word_embeddings.weight"].indices.tolist())
        free = next(i for i in range(weight.numel()) if i not in at)
        weight.view(-1)[free] += 1.0

    monkeypatch.setattr(Composer, "switch", switch)
    return "compose/grid*", OURS


def spoil_load(monkeypatch):
    real = Adapter.load

    def negated(path, **options):
        adapter = real(path, **options)
        return Adapter({n: SparseDiff(d.indices, -d.values, d.shape) for n, d in adapter.items()})

    monkeypatch.setattr(Adapter, "load", negated)
    return "compose/load*", load.FULL


@pytest.mark.parametrize("spoil", [spoil_undo, spoil_sum, spoil_neighbours, spoil_load])
def test_a_wrong_result_is_not_timed(monkeypatch, spoil):
    name, contender = spoil(monkeypatch)
    result = run_one(name)
    assert result["status"] == "red", result
    row = rows_of(result)[contender]
    assert row["status"] == "red"
    assert "clocks" not in row


def test_first_switches_build_their_union_anew(monkeypatch):
    counted = []
    real = compose.Composer

    def fresh(*arguments):
        counted.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(compose, "Composer", fresh)
    result = run_one("compose/switch2*")
    rounds = len(rows_of(result)[FIRST]["clocks"]["wall"]["samples"])
    assert len(counted) == rounds + 3  # warm-up


def spoil_index_add(sides):
    return sides.index_adds(lambda weight, at, values, coeff: weight.index_add_(0, at, values))


@pytest.mark.parametrize("wrong", [spoil_index_add, lambda sides: lambda i, coeff: None])
def test_a_wrong_competitor_is_not_timed(wrong):
    sides = Sides(2, "tiny", "fp32", 0.05, CPU)
    walk = compose._walk("grid", 2)
    assert compose._plain(sides.coo(), sides, walk, 0.05).status == "ok"
    assert compose._plain(wrong(sides), sides, walk, 0.05).status == "red"


# Targets and the command.


def test_targets_of_a_cpu_are_judged_on_a_cpu(monkeypatch):
    monkeypatch.setitem(compose_sides.MODELS, "xlmr_base", compose_sides.MODELS["tiny"])
    results = run_suite(compose_cases("xlmr_base"), "cpu", rounds=2)
    judged = {r["name"].split("/")[1]: [t["what"] for t in r["targets"]] for r in results}
    assert judged["switch2"] == [f"{OURS}: time at most 1x {PEER}"]
    assert judged["switch8"] == [f"{OURS}: time at most 0.4x {PEER}"]
    assert judged["language"] == judged["grid"] == []
    assert len(judged["load"]) == 3
    assert all("20x" in what for what in judged["load"])
    timing = Timing("wall", {OURS: [1.0, 1.0], PEER: [2.0, 2.0]})
    sides = {OURS: Contender(), PEER: Contender()}
    assert at_most(0.4, OURS, PEER, devices=("cpu",)).judge(timing, sides)["met"] is False
    assert faster(2, OURS, PEER, devices=("cpu",)).judge(timing, sides)["met"] is True


def test_the_roofline_target_divides_by_the_copy_of_the_same_rounds():
    copied = 2.0 * compose._COPY_BYTES
    timing = Timing("device", {OURS: [1.0, 1.0], compose.COPY: [2.0, 2.0]})
    judged = compose._roofline_target(0.4 * copied).judge(timing, {})
    assert judged["measured"] == pytest.approx(0.8)
    assert judged["met"] is True
    assert compose._roofline_target(1.0).judge(Timing("wall", {OURS: [1.0]}), {})["met"] is None


def test_the_suite_for_gpus_has_the_cases():
    names = [case.name for case in suite_cases()]
    model = "12x768x250002"
    for wanted in ("switch", "language", "grid"):
        more = {"switch": ["x2/bf16", "x8/bf16", "x2/fp32"]}.get(wanted, ["/bf16"])
        for shape in more:
            assert f"compose_{wanted}/{model}{shape}" in names


def test_one_command_prints_one_table_with_provenance(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmarks_run", RUN)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    threads = torch.get_num_threads()
    arguments = ["compose", "--model", "tiny", "--rounds", "2", "--only", "*switch2*"]
    try:
        assert runner.main([*arguments, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "compose.json").read_text())
    assert [case["status"] for case in document["cases"]] == ["ok"]
    assert {"device", "threads", "load average", "commit", "versions"} <= set(document["suite"])
    table = (tmp_path / "compose.md").read_text()
    assert table.count("\n|---") == 1
    assert f"| compose/switch2/fp32/tiny | {OURS} |" in table
    assert "the figures mean nothing" in table
    assert table in capsys.readouterr().out
