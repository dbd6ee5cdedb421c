"""Cases of masked training: all sides gated, a wrong one of ours not timed, bytes by hand."""

from __future__ import annotations

import pytest
import torch

from sparseft.benchmarking.cases import (
    combine,
    entries,
    sampled_embedding,
    sampled_grad,
    sparse_step,
    step_sides,
)
from sparseft.benchmarking.cases.parts import in_its_dtype, typical, where_torch_can
from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.limits import memory_free
from sparseft.benchmarking.suite import run_suite
from sparseft.diff import SparsePattern

CPU = torch.device("cpu")
BENCHES = {
    bench.name: bench
    for module in (sampled_grad, sampled_embedding, sparse_step, entries, combine)
    for bench in getattr(module, "BENCHES", None) or (module.BENCH,)
}


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setenv(COMPILE, "0")


def run_one(name, densities=(0.01, 0.1), dtype=None):
    bench = BENCHES[name]
    [shape] = bench.shapes["tiny"]
    [result] = run_suite([bench.build(shape, densities, dtype or bench.dtypes[0])], "cpu", rounds=2)
    return result, {row["name"]: row for row in result["contenders"]}


def pattern(indices, shape):
    return SparsePattern.from_indices(torch.tensor(indices), shape)


# All of them.


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_side_is_right_and_timed(name, dtype):
    result, rows = run_one(name, dtype=dtype)
    assert result["status"] == "ok", result
    assert result["targets"] == []
    ours = [row for row in rows.values() if row["ours"]]
    theirs = [row for row in rows.values() if not row["ours"] and "clocks" in row]
    assert {row["density"] for row in ours} == {0.01, 0.1}
    assert theirs
    for row in rows.values():
        if row["status"] == "skipped":
            assert COMPILE in row["reason"] or "torch has no kernel for it" in row["reason"]
            continue
        assert "clocks" in row
        assert row["bytes"] > 0
        assert row["checks"] or row["name"] == sparse_step.COPY
        assert all(check["passed"] for check in row["checks"])
    assert all(row["facts"]["backend"] == "reference" for row in ours)
    assert rows[result["baseline"]]["density"] is None


def test_torch_samples_products_in_fp32_alone():
    name = "torch.sparse.sampled_addmm, 1%"
    assert run_one("sampled_grad", (0.01,), "fp32")[1][name]["clocks"]
    row = run_one("sampled_grad", (0.01,), "bf16")[1][name]
    assert row["reason"].startswith("torch has no kernel for it: ")


# A wrong result has no speed.


def wrong_function(module, name):
    def spoil(monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: real(*a, **k).roll(1))

    return spoil


def wrong_sum(monkeypatch):
    """One entry too large by a hundredth, in the weight alone."""
    real = entries.write_sum_

    def write(weight, at, base, values, **options):
        real(weight, at, base, values, **options)
        weight.view(-1)[at[-1]] *= 1.01

    monkeypatch.setattr(entries, "write_sum_", write)


def wrong_restore(monkeypatch):
    real = entries.write_entries_

    def write(weight, at, values):
        real(weight, at[:-1], values[:-1])

    monkeypatch.setattr(entries, "write_entries_", write)


def wrong_diff(monkeypatch):
    real = entries.apply_diff_
    monkeypatch.setattr(entries, "apply_diff_", lambda w, diff: real(w, diff, coeff=1.5))


def wrong_rule(monkeypatch):
    real = combine.combine
    monkeypatch.setattr(combine, "combine", lambda *a: real(*a) + 1)


def wrong_optimizer(name):
    def spoil(monkeypatch):
        class Forgetful(getattr(step_sides, name)):
            def step(self, closure=None):
                super().step(closure)
                with torch.no_grad():
                    self.param_groups[0]["params"][0][0] += 1.0

        monkeypatch.setattr(step_sides, name, Forgetful)

    return spoil


SPOILED = {
    "sampled_grad": wrong_function(sampled_grad, "sampled_weight_grad"),
    "sampled_embedding": wrong_function(sampled_embedding, "sampled_embedding_grad"),
    "sparse_step": wrong_optimizer("SparseAdamW"),
    "sparse_step_lion": wrong_optimizer("SparseLion"),
    "sparse_step_sgd": wrong_optimizer("SparseSGD"),
    "capture": wrong_function(entries, "gather_entries"),
    "restore": wrong_restore,
    "write_sum": wrong_sum,
    "apply_diff": wrong_diff,
    "combine": wrong_rule,
}


@pytest.mark.parametrize("name", BENCHES)
def test_a_wrong_result_is_not_timed(name, monkeypatch):
    SPOILED[name](monkeypatch)
    result, rows = run_one(name, (0.1,))
    assert result["status"] == "red"
    for row in rows.values():
        if row["ours"] and "tenth of the tiles" not in row["name"]:
            assert row["status"] == "red"
            assert "clocks" not in row


def test_a_step_that_moves_frozen_entries_is_not_timed(monkeypatch):
    real = step_sides.Dense.masked_step

    def unmasked(self):
        real(self)
        self.parameters[0].data += 1e-2

    monkeypatch.setattr(step_sides.Dense, "masked_step", unmasked)
    _, rows = run_one("sparse_step", (0.1,))
    row = rows["dense, gradient times mask: torch AdamW"]
    assert row["status"] == "red"
    assert "frozen of" in row["reason"]


# Bytes and operations by hand.


def test_bytes_of_a_sampled_gradient():
    dy, x = torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(5, 4, dtype=torch.bfloat16)
    sides = sampled_grad._Sides(dy, x)
    mask = pattern([0, 7], (3, 4))
    ours, dense = sides.ours("ours", mask, 0.1), sides.dense()
    assert ours.bytes == 2 * (15 + 20) + 2 * (4 + 4)
    assert dense.bytes == 2 * (15 + 20) + 2 * 12
    assert ours.flops == dense.flops == 2 * 3 * 4 * 5


def test_bytes_of_an_embedding_gradient():
    # rows of 40 columns are 5 pieces of 8 fp32; token 0 twice, token 2 once, token 1 never
    mask = pattern([0, 1, 8, 45, 80 + 39], (3, 40))
    moved, additions = sampled_embedding.bytes_moved(mask, torch.tensor([0, 2, 0]), 4)
    assert moved == 3 * 8 + 32 * (2 * 2 + 1) + 4 * (3 + 1) + 4 * 5
    assert additions == 2 * 3 + 1


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        ("capture", 3 * (4 + 2) + 32 * 2),
        ("restore", 3 * (4 + 2) + 64 * 2),
        ("write_sum", 3 * (4 + 2 + 4) + 64 * 2),
        ("apply_diff", 3 * (4 + 4 + 2) + 3 * (4 + 2) + 2 * 64 * 2),
    ],
)
def test_bytes_of_entries(op, wanted):
    # 16 bf16 in 32 bytes: entries 0 and 15 share a piece
    assert entries.bytes_moved(op, pattern([0, 15, 16], (4, 8)), 2) == wanted


def test_bytes_of_a_step():
    rule = step_sides.ADAMW
    weights = [torch.randn(4, 8).bfloat16()]
    side = step_sides.Masked(weights, 0.999, rule)  # all but a few of 32 entries: both pieces
    assert side.bytes_moved() == (4 + 4 + 2 + 24) * side.nnz + 64 * 2
    assert step_sides.SGD.streamed(4) == step_sides.LION.streamed(4) == 4 + 4 + 4 + 16
    _, rows = run_one("sparse_step", (0.1,), dtype="bf16")
    numel = 4 * 96 * 96 + 3 * 96 * 128
    assert rows["dense: torch AdamW"]["bytes"] == 7 * 2 * numel
    assert rows["dense, gradient times mask: torch AdamW"]["bytes"] == (7 * 2 + 1) * numel


def test_bytes_of_a_composition():
    union = pattern([0, 15, 16], (4, 8))  # of diffs with 4 entries together
    assert combine.bytes_moved(union, 4, 2) == 3 * (4 + 2) + 4 * 5 + 64 * 2


def test_dense_rules_by_hand():
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    stack = torch.tensor([[[1.0, 2.0, 0.0, 3.0]], [[2.0, -3.0, 0.0, 2.0]], [[-2.0, 0.0, 4.0, 1.0]]])
    wanted = {
        "sum": [2.0, 0.0, 5.0, 7.0],
        "TIES": [2.5, -2.0, 5.0, 3.0],
        "largest": [3.0, -2.0, 5.0, 4.0],
        "consensus": [1.0 + 1.0, 1.0, 1.0, 1.0],
    }
    for label, rule in combine.RULES.items():
        got = combine.dense_form(base, stack, torch.ones(3), rule, torch.float64)
        assert got.tolist() == [wanted[label]], label


# What is asked for, and what there is.


@pytest.mark.parametrize("name", BENCHES)
def test_other_shapes_densities_and_dtypes_are_refused(name):
    bench = BENCHES[name]
    [shape] = bench.shapes["tiny"]
    with pytest.raises(ValueError, match=f"{name}: shape .* wanted {bench.dims}"):
        bench.build((*shape, 3), (0.1,), "fp32")
    with pytest.raises(ValueError, match=f"{name}: density is 1.5"):
        bench.build(shape, (0.1, 1.5), "fp32")
    with pytest.raises(ValueError, match=f"{name}: dtype is 'fp8'; wanted one of"):
        bench.build(shape, (0.1,), "fp8").build(CPU)


@pytest.mark.parametrize("name", BENCHES)
def test_too_little_memory_skips_with_the_numbers(name, monkeypatch):
    bench = BENCHES[name]
    shape = tuple(1 << 20 for _ in bench.shapes["tiny"][0])
    [result] = run_suite([bench.build(shape, (0.1,), "fp32")], "cpu", rounds=2)
    assert result["status"] == "skipped"
    assert "needs" in result["reason"]
    assert "cpu has" in result["reason"]


def test_as_many_layers_as_fit(monkeypatch):
    monkeypatch.setattr(sparse_step, "memory_free", lambda device: 1000)
    assert memory_free(CPU) > 1000
    assert sparse_step._layers_that_fit(300.0, 32, CPU) == 3
    assert sparse_step._layers_that_fit(300.0, 2, CPU) == 2


# Parts.


def test_the_gate_of_sums_in_their_dtype():
    exact = torch.randn(1000, dtype=torch.float64)
    assert in_its_dtype("x", exact.bfloat16(), exact).passed
    twice = exact.bfloat16() * (1 + 2**-6)
    assert not in_its_dtype("x", twice, exact).passed
    assert in_its_dtype("x", twice, exact, terms=16).passed
    assert not in_its_dtype("x", exact.bfloat16()[1:], exact).passed


def test_the_typical_density_and_what_torch_cannot_do():
    assert typical((0.0005, 0.02, 0.1)) == 0.02
    assert typical((0.0005,)) == 0.0005

    def missing():
        raise RuntimeError("not implemented for 'Half'\nmore")

    row = where_torch_can(missing, lambda got: [], density=0.1)
    assert (row.status, row.density) == ("skipped", 0.1)
    assert row.skipped == "torch has no kernel for it: not implemented for 'Half'"

    def full():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        where_torch_can(full, lambda got: [])
