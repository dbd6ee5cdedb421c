"""The differentiable composition of one weight, and the layout of the kernels, on any device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import BackendError, DiffError
from sparseft.ops.combine import Rule, Term, combine
from sparseft.ops.packed import BLOCK, EntryTable, PackedTerm, PackedUnion
from sparseft.ops.union import _by_marks, _by_sorting, union_of


def make(shape=(9, 7), n=3, dtype=torch.float32, density=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    diffs = []
    for _ in range(n):
        pattern = SparsePattern.from_mask(torch.rand(shape, generator=g) < density)
        values = torch.randn(pattern.nnz, generator=g, dtype=torch.float64).to(dtype)
        diffs.append(SparseDiff.from_pattern(pattern, values))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), diffs


class TestComposeDiffs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_the_bits_of_the_rule_sum(self, dtype):
        weight, diffs = make(dtype=dtype)
        coeffs = [0.5, 0.0, -1.3]
        got = ops.compose_diffs(weight, diffs, coeffs)
        union, places = union_of([d.indices for d in diffs])
        terms = [Term(c, d.values, p) for c, d, p in zip(coeffs, diffs, places, strict=True) if c]
        wanted = weight.clone()
        ops.write_sum_(
            wanted, union, wanted.view(-1)[union.long()], combine(terms, len(union), Rule("sum"))
        )
        assert torch.equal(got, wanted)
        assert got.data_ptr() != weight.data_ptr()

    def test_gradcheck(self):
        weight, diffs = make((5, 4), dtype=torch.float64)
        weight.requires_grad_()
        values = [d.values.clone().requires_grad_() for d in diffs]
        coeffs = torch.tensor([0.7, 0.0, -1.1], dtype=torch.float64, requires_grad=True)

        def f(w, c, *v):
            parts = [
                SparseDiff._trusted(d.indices, x, d.shape) for d, x in zip(diffs, v, strict=True)
            ]
            return ops.compose_diffs(w, parts, c)

        assert torch.autograd.gradcheck(f, (weight, coeffs, *values))

    def test_non_contiguous_weights_and_gradients(self):
        weight, diffs = make((9, 7))
        transposed = weight.t().contiguous().t().requires_grad_()
        out = ops.compose_diffs(transposed, diffs, [1.0, 2.0, 3.0])
        assert torch.equal(out, ops.compose_diffs(weight, diffs, [1.0, 2.0, 3.0]))
        out.t().square().sum().backward()
        assert torch.allclose(transposed.grad, 2 * out.detach())

    def test_a_union_made_once_serves_other_values(self):
        weight, diffs = make()
        packed = ops.pack_diffs(diffs)
        other = [SparseDiff(d.indices, 2 * d.values, d.shape) for d in diffs]
        got = ops.compose_diffs(weight, other, [1.0] * 3, packed=packed)
        assert torch.equal(got, ops.compose_diffs(weight, other, [1.0] * 3))

    def test_second_derivatives_are_refused(self):
        weight, diffs = make()
        coeffs = torch.ones(3, requires_grad=True)
        loss = ops.compose_diffs(weight, diffs, coeffs).square().sum()
        (grad,) = torch.autograd.grad(loss, coeffs, create_graph=True)
        with pytest.raises(DiffError, match="differentiable once"):
            grad.sum().backward()

    def test_what_does_not_belong_together(self):
        weight, diffs = make()
        with pytest.raises(DiffError, match="no diff was given"):
            ops.compose_diffs(weight, [], [])
        with pytest.raises(DiffError, match=r"coeffs has shape \(2,\).*wanted \(3,\)"):
            ops.compose_diffs(weight, diffs, [1.0, 2.0])
        with pytest.raises(DiffError, match="weight has shape"):
            ops.compose_diffs(weight.t(), diffs, [1.0] * 3)
        both = [diffs[0], SparseDiff(diffs[1].indices, diffs[1].values, diffs[1].shape, "set")]
        with pytest.raises(DiffError, match="diff 1 has mode 'set'"):
            ops.pack_diffs(both)
        with pytest.raises(DiffError, match="diff 1 has shape"):
            ops.pack_diffs([diffs[0], make((2, 2))[1][0]])
        with pytest.raises(DiffError, match="packed was made of 3 diffs"):
            ops.compose_diffs(weight, diffs[:2], [1.0] * 2, packed=ops.pack_diffs(diffs))
        with pytest.raises(BackendError, match="'triton' was asked for"):
            ops.compose_diffs(weight, diffs, [1.0] * 3, backend="triton")


positions = st.lists(st.sets(st.integers(0, 3 * BLOCK // 2), max_size=60), min_size=1, max_size=4)


@given(tensors=st.lists(positions, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_packed_layout(tensors):
    """Every value lies at its entry, in the order of the adapters; pads count nothing."""
    indices, terms, wanted = [], [], []
    for lists in tensors:
        own = [torch.tensor(sorted(s), dtype=torch.int32) for s in lists]
        union, places = union_of(own)
        indices.append(union)
        values = [torch.arange(len(o), dtype=torch.float32) + 1000 * i for i, o in enumerate(own)]
        terms.append(
            [PackedTerm(i, v, p) for i, (v, p) in enumerate(zip(values, places, strict=True))]
        )
        for at in union.tolist():
            wanted += [
                (i, float(values[i][o.tolist().index(at)])) for i, o in enumerate(own) if at in o
            ]
    packed = PackedUnion.pack(indices, terms, 4)
    assert list(zip(packed.ordinals.tolist(), packed.values.tolist(), strict=True)) == wanted
    assert packed.indices.numel() % BLOCK == 0
    assert (packed.counts[packed.indices < 0] == 0).all()
    ends = packed.counts.view(-1, BLOCK).long().sum(1).cumsum(0)
    assert torch.equal(packed.block_entry[1:], ends[:-1])
    assert [p.tolist() for p in packed.pieces(packed.indices)] == [u.tolist() for u in indices]


def test_many_adapters_and_large_positions():
    lists = [torch.tensor([i % 7, 2**33 + i], dtype=torch.int64) for i in range(300)]
    union, places = union_of(lists)
    terms = [PackedTerm(i, torch.ones(2) * i, p) for i, p in enumerate(places)]
    packed = PackedUnion.pack([union], [terms], 300)
    assert packed.indices.dtype == torch.int64
    assert packed.counts.dtype == packed.ordinals.dtype == torch.int16
    assert int(packed.counts.max()) > 40
    assert torch.equal(packed.values, packed.ordinals.float())


def test_tables_of_nothing():
    table = EntryTable.of([torch.empty(0, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)])
    assert [p.tolist() for p in table.pieces(table.indices)] == [[], [3]]
    assert table.block_tensor.tolist() == [1]


@given(lists=st.lists(st.sets(st.integers(0, 700_000), max_size=80), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_both_ways_to_a_union_agree(lists):
    arrays = [torch.tensor(sorted(s), dtype=torch.int32).numpy() for s in lists]
    span = 1 + max((int(a[-1]) for a in arrays if len(a)), default=-1)
    one, other = _by_sorting(arrays), _by_marks(arrays, span)
    assert one[0].tolist() == other[0].tolist() == sorted(set().union(*lists))
    assert [p.tolist() for p in one[1]] == [p.tolist() for p in other[1]]
