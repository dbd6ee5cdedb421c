"""embedding_diff: looked-up rows plus sparse rows, as a table with the diff written in gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import DiffError
from sparseft.ops import RowGroups
from sparseft.ops.spmm_embedding import embedding_diff_at, embedding_diff_reference


def make_diff(vocab: int, dim: int, density: float, dtype=torch.float32) -> SparseDiff:
    mask = torch.rand(vocab, dim) < density
    mask[3] = False
    return SparseDiff.from_pattern(
        SparsePattern.from_mask(mask), torch.randn(int(mask.sum()), dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_has_the_bits_of_a_written_table(dtype, density):
    table, diff = torch.randn(11, 7).to(dtype), make_diff(11, 7, density)
    ids = torch.randint(0, 11, (4, 5))
    written = table.clone()
    ops.apply_diff_(written, diff)
    got = ops.embedding_diff(F.embedding(ids, table), ids, diff)
    assert got.dtype == dtype
    assert torch.equal(got, F.embedding(ids, written))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("groups", [[[0, 3], [2]], [[0], [1, 2, 3]], [[], [1]]], ids=str)
def test_rows_have_their_own_diffs(groups, ids_dtype):
    diffs = [make_diff(11, 7, 0.4), make_diff(11, 7, 0.2)]
    ids = torch.randint(0, 11, (4, 5), dtype=ids_dtype)
    looked_up = F.embedding(ids, torch.randn(11, 7))
    rows = RowGroups.of(groups, 4)
    got = ops.embedding_diff(looked_up, ids, diffs, rows=rows)
    expected = embedding_diff_reference(
        looked_up, ids, [d.values for d in diffs], [d.indices for d in diffs],
        rows.order, rows.ends, 11,
    )  # fmt: skip
    assert torch.equal(got, expected)
    for row in set(range(4)) - {r for g in groups for r in g}:
        assert torch.equal(got[row], looked_up[row])


def test_padding_is_added_to_but_gets_no_gradient():
    diff = make_diff(11, 7, 1.0)
    ids = torch.tensor([[1, 2, 1, 5]])
    looked_up = torch.randn(1, 4, 7)
    values = diff.values.clone().requires_grad_()
    learning = SparseDiff.from_pattern(diff.pattern, values)
    for padding in (2, -9):
        values.grad = None
        got = ops.embedding_diff(looked_up, ids, learning, padding_idx=padding)
        assert not torch.equal(got[0, 1], looked_up[0, 1])
        got.sum().backward()
        grad = torch.zeros(11 * 7).index_put((diff.indices.long(),), values.grad).view(11, 7)
        assert torch.equal(grad[1], torch.full((7,), 2.0))
        assert torch.equal(grad[5], torch.ones(7))
        assert grad.sum() == 21


@pytest.mark.parametrize("by_frequency", [False, True])
def test_gradcheck(by_frequency):
    diffs = [make_diff(6, 4, 0.5, torch.float64), make_diff(6, 4, 0.3, torch.float64)]
    y = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    values = [d.values.requires_grad_() for d in diffs]
    ids = torch.tensor([[0, 1], [4, 4], [2, 1]])
    order = torch.tensor([2, 0])

    def op(y, a, b):
        return embedding_diff_at(
            y, ids, [a, b], [d.indices for d in diffs], order, [1, 2], 6, -1, by_frequency, ""
        )

    # The frequency scales gradients, not the function: no finite difference sees it.
    if by_frequency:
        op(y, *values).sum().backward()
        assert y.grad.eq(1).all()
        assert values[0].grad.sum() == diffs[0].pattern.to_mask()[[1, 2]].sum()
    else:
        assert torch.autograd.gradcheck(op, (y, *values))


def test_errors():
    diff = make_diff(11, 7, 0.4)
    with pytest.raises(DiffError, match=r"\(4, 5, 8\).*\(4, 5\).*\(11, 7\) need \(4, 5, 7\)"):
        ops.embedding_diff(torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.long), diff)


def test_empty_batch():
    diff = make_diff(11, 7, 0.4)
    got = ops.embedding_diff(torch.randn(0, 5, 7), torch.zeros(0, 5, dtype=torch.long), diff)
    assert got.shape == (0, 5, 7)
