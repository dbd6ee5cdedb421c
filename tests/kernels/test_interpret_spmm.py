"""Products with sparse diffs through the kernels, against their definition; interpreted or on a
GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseft import Adapter, SeparateComposer, ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import RowGroups
from sparseft.ops.spmm import segment_spmm, spmm_reference
from sparseft.ops.spmm_embedding import embedding_diff_reference

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _load(name: str):
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assert_as_accurate = _load("_accuracy").assert_as_accurate


def make_diff(m: int, n: int, density: float | str, device: str) -> SparseDiff:
    mask = torch.zeros(m, n, dtype=torch.bool)
    if density == "skewed":
        mask[m // 2] = True
        mask[m - 1] = True
        mask[:, n // 3] = True
        mask[m // 4] = False
    elif density != "empty":
        mask = torch.rand(m, n) < density
    pattern = SparsePattern.from_mask(mask).to(device)
    return SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz, device=device))


def check(x, y, diffs, rows, biases, transposed, name=""):
    values, indices = [d.values for d in diffs], [d.indices for d in diffs]
    shape = diffs[0].shape
    got = segment_spmm(
        x, y, values, indices, biases, rows.order, list(rows.ends), *shape, transposed, "triton"
    )

    def define(dtype):
        return spmm_reference(
            x.to(dtype), None if y is None else y.to(dtype), [v.to(dtype) for v in values],
            indices, [b.to(dtype) for b in biases], rows.order, rows.ends, *shape, transposed,
        )  # fmt: skip

    theirs = spmm_reference(
        x, y, values, indices, biases, rows.order, rows.ends, *shape, transposed
    )
    assert got.dtype == theirs.dtype
    assert_as_accurate(got, theirs, define(torch.float64), name=name)
    return got


# Tokens: one, a few, and enough for the packed form; outputs around a block of 16; a row longer
# than the limit, and none.
CASES = [
    (1, 33, 40, 0.3),
    (1, 40, 700, "skewed"),
    (5, 33, 40, 0.3),
    (7, 40, 300, "skewed"),
    (8, 16, 5, 1.0),
    (37, 17, 40, 0.2),
    (40, 40, 300, "skewed"),
    (33, 5, 1, 0.5),
    (3, 5, 4, "empty"),
    (34, 5, 4, "empty"),
]


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("t", "m", "n", "density"), CASES)
def test_equals_the_definition(t, m, n, density, transposed, device):
    diff = make_diff(*((n, m) if transposed else (m, n)), density, device)
    x, y = torch.randn(t, n, device=device), torch.randn(t, m, device=device)
    whole = RowGroups.whole(t)
    check(x, y, [diff], whole, [], transposed)
    check(x, None, [diff], whole, [torch.randn(m, device=device)], transposed)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 4, 35])
def test_dtypes_round_once(t, dtype, device):
    diff = make_diff(20, 30, 0.4, device)
    x, y = torch.randn(t, 30, device=device).to(dtype), torch.randn(t, 20, device=device).to(dtype)
    got = ops.spmm(x, diff, add_to=y, backend="triton")
    wide = ops.spmm(x.float(), diff, add_to=y.float(), backend="triton")
    assert torch.equal(got, wide.to(dtype))
    mixed = ops.spmm(x, diff, add_to=y.float(), backend="triton")
    assert torch.equal(mixed, wide)


GROUPS = [
    [[0, 2, 5], [1, 4]],
    [[0, 1, 2], [3]],
    [[5, 4, 3, 2, 1], [0]],
    [[], [3]],
]


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_rows_have_their_own_diffs(groups, length, device):
    diffs = [make_diff(33, 80, "skewed", device), make_diff(33, 80, 0.1, device)]
    biases = [torch.randn(33, device=device), torch.empty(0, device=device)]
    x = torch.randn(6, length, 80, device=device)
    y = torch.randn(6, length, 33, device=device)
    rows = RowGroups.of(groups, 6, device)
    got = check(x, y, diffs, rows, biases, False)
    alone = check(x, None, diffs, rows, biases, False)
    for row in set(range(6)) - {r for g in groups for r in g}:
        assert torch.equal(got[row], y[row])
        assert not alone[row].any()


@pytest.mark.parametrize("device", LANES)
def test_tables_are_kept_by_address_and_the_older_half_is_dropped(device, monkeypatch):
    kernels = pytest.importorskip("sparseft_kernels.spmm", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "_tables", type(kernels._tables)())
    monkeypatch.setattr(kernels, "_TABLES", 4)
    diff, made = make_diff(5, 4, 1.0, device), []
    for tokens in (1, 2, 3, 4, 5):  # another number of rows, another table
        x = torch.randn(tokens, 4, device=device)
        for _ in range(2):
            made.append(ops.spmm(x, diff, backend="triton"))
            torch.testing.assert_close(made[-1], x @ diff.to_dense().T)
    assert [key[1][0][6] for key in kernels._tables] == [3, 4, 5]


@pytest.mark.parametrize("device", LANES)
def test_equal_rows_in_any_group_have_equal_bits(device):
    """A row's sum depends on its entries alone, not on the group's place or the other groups."""
    diff, other = make_diff(33, 80, "skewed", device), make_diff(33, 80, 0.2, device)
    x = torch.randn(1, 4, 80, device=device).expand(6, 4, 80).contiguous()
    y = torch.randn(1, 4, 33, device=device).expand(6, 4, 33).contiguous()
    rows = RowGroups.of([[4, 1], [0, 2]], 6, device)
    got = ops.spmm(x, [diff, other], rows=rows, add_to=y, backend="triton")
    apart = ops.spmm(x[:2], diff, add_to=y[:2], backend="triton")
    assert torch.equal(got[[4, 1]], apart)
    assert torch.equal(got[0], got[2])
    assert torch.equal(got, ops.spmm(x, [diff, other], rows=rows, add_to=y, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("t", [6, 40])
def test_nan_stays_in_its_token(t, device):
    diff = make_diff(20, 300, "skewed", device)
    x = torch.randn(t, 300, device=device)
    clean = ops.spmm(x, diff, backend="triton")
    x[3] = float("nan")
    got = ops.spmm(x, diff, backend="triton")
    kept = [row for row in range(t) if row != 3]
    assert torch.equal(got[kept], clean[kept])
    assert got[3].isnan().any()


@pytest.mark.parametrize("device", LANES)
def test_backward_through_the_kernels(device):
    diffs = [make_diff(20, 30, 0.3, device), make_diff(20, 30, 0.2, device)]
    rows = RowGroups.of([[1, 3], [0]], 4, device)
    x = torch.randn(4, 3, 30, device=device)
    dy = torch.randn(4, 3, 20, device=device)
    grads = []
    for backend in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        values = [d.values.clone().requires_grad_() for d in diffs]
        made = [SparseDiff.from_pattern(d.pattern, v) for d, v in zip(diffs, values, strict=True)]
        (ops.spmm(leaf, made, rows=rows, backend=backend) * dy).sum().backward()
        grads.append([leaf.grad, *(v.grad for v in values)])
    for theirs, mine in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[2], [0]]], ids=str)
def test_embedding_rows_have_the_bits_of_the_definition(groups, dtype, device):
    diffs = [make_diff(11, 300, 0.6, device), make_diff(11, 300, 0.1, device)][: len(groups)]
    ids = torch.randint(0, 11, (3, 5), device=device)
    looked_up = torch.randn(3, 5, 300, device=device).to(dtype)
    rows = RowGroups.of(groups, 3, device)
    expected = embedding_diff_reference(
        looked_up, ids, [d.values for d in diffs], [d.indices for d in diffs],
        rows.order, rows.ends, 11,
    )  # fmt: skip
    before = looked_up.clone()
    got = ops.embedding_diff(looked_up, ids, diffs, rows=rows, backend="triton")
    assert torch.equal(got, expected)
    assert torch.equal(looked_up, before)
    short = ops.embedding_diff(looked_up, ids.int(), diffs, rows=rows, backend="triton")
    assert torch.equal(short, expected)


@pytest.mark.parametrize("device", LANES)
def test_separate_mode_through_the_kernels(device):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 5))
    adapters = {}
    for name in "ab":
        diffs = {
            n: SparseDiff.from_dense(torch.randn(p.shape) * (torch.rand(p.shape) < 0.4) * 0.1)
            for n, p in model.named_parameters()
        }
        adapters[name] = Adapter(diffs, name=name)
    model, ids = model.to(device), torch.randint(0, 20, (4, 3), device=device)
    found = []
    with SeparateComposer(model, adapters) as handle:
        for backend in ("reference", "triton"):
            with ops.backend(backend), handle.rows(["a", None, "b", ["a", "b"]]):
                out = model(ids)
                out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
