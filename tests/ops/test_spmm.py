"""spmm against its definition: shapes, groups, dtypes, orientation, gradients, and its errors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import BackendError, DiffError
from sparseft.ops import RowGroups, _csr, _spmm_cpu
from sparseft.ops.spmm import segment_spmm, spmm_reference


def make_diff(m: int, n: int, density: float | str, dtype=torch.float32) -> SparseDiff:
    mask = torch.zeros(m, n, dtype=torch.bool)
    if density == "skewed":
        mask[m // 2] = True
        mask[:, n // 3] = True
    elif density == "full":
        mask[:] = True
    elif density == "one entry":
        mask[m - 1, n - 1] = True
    elif density != "empty":
        mask = torch.rand(m, n) < density
    return SparseDiff.from_pattern(
        SparsePattern.from_mask(mask), torch.randn(int(mask.sum()), dtype=dtype)
    )


def reference(x, diffs, groups, *, add_to=None, transposed=False):
    return spmm_reference(
        x, add_to, [d.values for d in diffs], [d.indices for d in diffs], [],
        groups.order, groups.ends, *diffs[0].shape, transposed,
    )  # fmt: skip


SHAPES = [  # T, M, N
    (37, 130, 67),
    (1, 65, 33),
    (300, 64, 128),
    (5, 1, 9),
    (5, 9, 1),
    (9, 700, 300),
]
DENSITIES = ("empty", "one entry", "full", "skewed", 0.002, 0.03, 0.3)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("t", "m", "n"), SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_dense_product(t, m, n, density, transposed, assert_as_accurate):
    diff = make_diff(*((n, m) if transposed else (m, n)), density)
    x, y = torch.randn(t, n), torch.randn(t, m)
    whole = RowGroups.whole(t)
    got = ops.spmm(x, diff, add_to=y, transposed=transposed)
    theirs = reference(x, [diff], whole, add_to=y, transposed=transposed)
    wide = SparseDiff.from_pattern(diff.pattern, diff.values.double())
    exact = reference(x.double(), [wide], whole, add_to=y.double(), transposed=transposed)
    assert_as_accurate(got, theirs, exact)
    alone = ops.spmm(x, diff, transposed=transposed)
    assert_as_accurate(
        alone,
        reference(x, [diff], whole, transposed=transposed),
        reference(x.double(), [wide], whole, transposed=transposed),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_fp32_and_rounds_once(dtype):
    diff = make_diff(130, 70, 0.3)
    x, y = torch.randn(40, 70).to(dtype), torch.randn(40, 130).to(dtype)
    got = ops.spmm(x, diff, add_to=y)
    assert got.dtype == dtype
    wide = ops.spmm(x.float(), diff, add_to=y.float())
    assert torch.equal(got, wide.to(dtype))
    assert ops.spmm(x, diff).dtype == dtype
    # autocast: a low-precision input beside an fp32 output, and the other way round
    assert torch.equal(ops.spmm(x, diff, add_to=y.float()), wide)
    assert torch.equal(ops.spmm(x.float(), diff, add_to=y), got)


def test_leading_dimensions_and_strides():
    diff = make_diff(70, 50, 0.1)
    x, y = torch.randn(4, 9, 50), torch.randn(4, 9, 70)
    expected = ops.spmm(x.reshape(36, 50), diff, add_to=y.reshape(36, 70)).view(4, 9, 70)
    assert torch.equal(ops.spmm(x, diff, add_to=y), expected)
    strided = torch.cat((x, x), -1)[..., :50]
    assert torch.equal(ops.spmm(strided, diff, add_to=y.mT.contiguous().mT), expected)
    assert torch.equal(ops.spmm(x.view(2, 2, 9, 50), diff).view(4, 9, 70), ops.spmm(x, diff))


GROUPS = [
    [[0, 2, 5], [1, 4]],
    [[0], [1, 2, 3, 4, 5]],
    [[0, 1, 2], [3]],
    [[5, 4, 3, 2, 1], []],
    [[], []],
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("length", [(), (3,)], ids=["2-d", "3-d"])
def test_rows_have_their_own_diffs(groups, length):
    """Each row has, bit for bit, what the whole batch has under its diff; others are untouched."""
    diffs = [make_diff(33, 20, 0.2), make_diff(33, 20, 0.05)]
    x, y = torch.randn(6, *length, 20), torch.randn(6, *length, 33)
    rows = RowGroups.of(groups, 6)
    got = ops.spmm(x, diffs, rows=rows, add_to=y)
    torch.testing.assert_close(got, reference(x, diffs, rows, add_to=y))
    rest = set(range(6))
    for diff, group in zip(diffs, groups, strict=True):
        apart = ops.spmm(x, diff, add_to=y)
        for row in group:
            assert torch.equal(got[row], apart[row])
            rest.discard(row)
    for row in rest:
        assert torch.equal(got[row], y[row])
    alone = ops.spmm(x, diffs, rows=rows)
    for row in rest:
        assert not alone[row].any()


def test_nan_and_infinity_stay_in_their_token():
    diff = make_diff(40, 30, 0.3)
    x, y = torch.randn(20, 30), torch.randn(20, 40)
    clean = ops.spmm(x, diff, add_to=y)
    x[3], x[9] = float("nan"), float("inf")
    got = ops.spmm(x, diff, add_to=y)
    kept = [t for t in range(20) if t not in (3, 9)]
    assert torch.equal(got[kept], clean[kept])
    assert not got[3].isfinite().any()


def test_a_token_does_not_depend_on_how_many_there_are():
    diff = make_diff(130, 70, 0.3)
    x = torch.randn(600, 70)
    whole = ops.spmm(x, diff)
    for count in (1, 2, 7, 8, 9, 33, 255, 256, 257, 511):
        assert torch.equal(ops.spmm(x[:count], diff), whole[:count]), count
    assert torch.equal(ops.spmm(x, diff), whole)


@pytest.mark.parametrize(("slab", "panel"), [(16, 8), (64, 100)])
def test_slabs_and_panels_change_nothing(monkeypatch, slab, panel):
    diff = make_diff(130, 70, 0.3)
    x, y = torch.randn(150, 70), torch.randn(150, 130)
    expected = ops.spmm(x, diff, add_to=y)
    monkeypatch.setattr(_spmm_cpu, "_SLAB", slab)
    monkeypatch.setattr(_spmm_cpu, "_PANEL", panel)
    assert torch.equal(ops.spmm(x, diff, add_to=y), expected)


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0)], ids=str)
def test_empty_operands(shape):
    t, m, n = shape
    diff = make_diff(m, n, "full")
    y = torch.randn(t, m)
    assert torch.equal(ops.spmm(torch.randn(t, n), diff, add_to=y), y)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", [None, [3, 0, 2]])
def test_gradcheck(transposed, order):
    m, n = (5, 6) if transposed else (6, 5)
    diffs = [make_diff(m, n, 0.4, torch.float64), make_diff(m, n, 0.2, torch.float64)]
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    values = [d.values.requires_grad_() for d in diffs]
    biases = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in diffs]
    places = None if order is None else torch.tensor(order)

    def op(x, y, a, b, c, d):
        return segment_spmm(
            x, y, [a, b], [d.indices for d in diffs], [c, d], places, [1, 3], m, n, transposed, ""
        )

    assert torch.autograd.gradcheck(op, (x, y, *values, *biases))
    assert torch.autograd.gradgradcheck(op, (x, y, *values, *biases))


def test_gradients_of_values_come_from_the_groups_rows_only():
    diffs = [make_diff(9, 5, 0.5), make_diff(9, 5, 0.3)]
    values = [d.values.clone().requires_grad_() for d in diffs]
    x = torch.randn(4, 3, 5)
    rows = RowGroups.of([[1, 3], [2]], 4)
    learning = [SparseDiff.from_pattern(d.pattern, v) for d, v in zip(diffs, values, strict=True)]
    dy = torch.randn(4, 3, 9)
    (ops.spmm(x, learning, rows=rows) * dy).sum().backward()
    for diff, value, group in zip(diffs, values, ([1, 3], [2]), strict=True):
        expected = ops.sampled_weight_grad(dy[group], x[group], diff.pattern)
        assert torch.equal(value.grad, expected)


def test_an_empty_bias_stands_for_none():
    diffs = [make_diff(5, 4, 0.5), make_diff(5, 4, 0.5)]
    groups, x = RowGroups.of([[2], [0]], 3), torch.randn(3, 4)
    bias = torch.randn(5, requires_grad=True)
    values, indices = [d.values for d in diffs], [d.indices for d in diffs]
    rest = (groups.order, list(groups.ends), 5, 4, False)
    for backend in ("reference", "auto"):
        bias.grad = None
        got = segment_spmm(x, None, values, indices, [bias, torch.empty(0)], *rest, backend)
        got.sum().backward()
        plain = ops.spmm(x, diffs, rows=groups)
        torch.testing.assert_close(got[2], plain[2] + bias)
        assert torch.equal(got[:2], plain[:2])
        assert torch.equal(bias.grad, torch.ones(5))


def test_mixed_dtypes_in_backward():
    """Autocast: bf16 gradients of a bf16 output, fp32 values."""
    diff = make_diff(9, 5, 0.5)
    value = diff.values.clone().requires_grad_()
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    y = ops.spmm(x, SparseDiff.from_pattern(diff.pattern, value))
    y.sum().backward()
    assert (x.grad.dtype, value.grad.dtype) == (torch.bfloat16, torch.float32)


def test_operands_are_not_changed():
    diff = make_diff(9, 5, 0.5)
    x, y = torch.randn(4, 5), torch.randn(4, 9)
    copies = x.clone(), y.clone(), diff.values.clone()
    ops.spmm(x, diff, rows=RowGroups.of([[2]], 4), add_to=y)
    assert all(torch.equal(a, b) for a, b in zip((x, y, diff.values), copies, strict=True))


def test_no_dense_weight_is_made():
    diff = make_diff(1500, 1000, 0.01)
    x = torch.randn(2, 1000)
    ops.spmm(x, diff)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.spmm(x, diff)
    used = max(event.cpu_memory_usage for event in profile.key_averages())
    assert used < 1500 * 1000, "a quarter of the dense fp32 weight"


def test_layout_is_kept_per_index_tensor_and_dies_with_it():
    diff = make_diff(40, 30, 0.1)
    first = _csr.csr_of(diff.indices, 40, 30, transposed=True)
    assert _csr.csr_of(diff.indices, 40, 30, transposed=True) is first
    alive = weakref.ref(first.inputs)
    del first, diff
    gc.collect()
    assert alive() is None


def test_long_rows_are_found():
    csr = _csr.csr_of(make_diff(100, 300, "skewed").indices, 100, 300, transposed=False)
    assert csr.long_rows.tolist() == [50]
    assert csr.offsets[51] - csr.offsets[50] > csr.limit
    flipped = _csr.csr_of(make_diff(100, 300, "skewed").indices, 100, 300, transposed=True)
    assert flipped.long_rows.tolist() == [100]
    even = _csr.csr_of(make_diff(100, 300, 0.3).indices, 100, 300, transposed=False)
    assert even.long_rows.numel() == 0


def test_compiles_without_a_graph_break():
    diff = make_diff(9, 5, 0.5)
    x, y = torch.randn(4, 5), torch.randn(4, 9)
    step = lambda x, y: ops.spmm(x, diff, add_to=y)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), step(x, y))


def test_errors_name_what_was_got_and_wanted(monkeypatch):
    diff, x = make_diff(4, 6, 0.5), torch.randn(3, 6)
    with pytest.raises(DiffError, match=r"\(3, 4\).*\(4, 6\) take 6 inputs.*transposed=True"):
        ops.spmm(torch.randn(3, 4), diff)
    with pytest.raises(DiffError, match=r"add_to has shape \(3, 5\).*\(3, 4\)"):
        ops.spmm(x, diff, add_to=torch.randn(3, 5))
    with pytest.raises(DiffError, match="mode 'set'"):
        ops.spmm(x, SparseDiff(diff.indices, diff.values, diff.shape, "set"))
    with pytest.raises(DiffError, match="without rows="):
        ops.spmm(x, [diff, diff])
    with pytest.raises(DiffError, match="no diff"):
        ops.spmm(x, [])
    with pytest.raises(DiffError, match="2 groups of rows were given 1 diffs"):
        ops.spmm(x, diff, rows=RowGroups.of([[0], [1]], 3))
    with pytest.raises(DiffError, match=r"batch of 4 rows.*\(3, 6\)"):
        ops.spmm(x, diff, rows=RowGroups.of([[0]], 4))
    with pytest.raises(DiffError, match="each once at most"):
        RowGroups.of([[0, 1], [1]], 3)
    with pytest.raises(DiffError, match="from 0 to 2"):
        RowGroups.of([[3]], 3)
    with pytest.raises(DiffError, match=r"diff 1 has shape \(4, 7\)"):
        ops.spmm(x, [diff, make_diff(4, 7, 0.5)], rows=RowGroups.of([[0], [1]], 3))
    with pytest.raises(DiffError, match="one dimension"):
        ops.spmm(x[0], diff)
    with pytest.raises(DiffError, match="finite"):
        SparseDiff.from_pattern(diff.pattern, diff.values * float("nan"))
    with pytest.raises(BackendError, match="lie on cpu"):
        ops.spmm(x, diff, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="an operand is torch.float64"):
        ops.spmm(x.double(), diff, backend="triton")
