"""The union of entries and overlaps, against sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import SparseDiff, SparsePattern
from sparseft.composition import jaccard
from sparseft.composition.overlap import Overlap, overlaps
from sparseft.ops.union import union_of

positions = st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@given(lists=positions)
@settings(max_examples=100, deadline=None)
def test_union(dtype, lists):
    tensors = [torch.tensor(sorted(s), dtype=dtype) for s in lists]
    union, places = union_of(tensors)
    assert union.tolist() == sorted(set().union(*lists))
    assert union.dtype == dtype
    for tensor, place in zip(tensors, places, strict=True):
        if place is None:
            assert torch.equal(tensor, union)
        else:
            assert place.dtype == torch.int32
            assert torch.equal(union[place.long()], tensor)
            assert len(tensor) < len(union)


def test_union_of_large_positions():
    far = torch.tensor([5, 2**33], dtype=torch.int64)
    union, places = union_of([far, torch.tensor([2**32], dtype=torch.int64)])
    assert union.tolist() == [5, 2**32, 2**33]
    assert [p.tolist() for p in places] == [[0, 2], [1]]


@given(a=st.sets(st.integers(0, 30)), b=st.sets(st.integers(0, 30)))
@settings(max_examples=100, deadline=None)
def test_overlap(a, b):
    def pattern(s):
        return SparsePattern.from_indices(torch.tensor(sorted(s), dtype=torch.int64), (31,))

    found = jaccard({"w": pattern(a)}, {"w": pattern(b)})["w"]
    assert (found.common, found.union) == (len(a & b), len(a | b))
    assert found.jaccard == (len(a & b) / len(a | b) if a | b else 0.0)


def test_opposed_signs_and_tensors_of_one():
    def diff(values):
        tensor = torch.tensor(values)
        return SparseDiff.from_dense(tensor, tensor != 0)

    a = {"w": diff([1.0, -1.0, 2.0, 0.0]), "x": diff([1.0])}
    b = {"w": diff([1.0, 1.0, 0.0, 3.0]), "y": diff([1.0, 1.0])}
    found = jaccard(a, b)
    assert found == {"w": Overlap(2, 4, 1), "x": Overlap(0, 1, 0), "y": Overlap(0, 2, 0)}
    assert overlaps([a, b, a])[(0, 1)] == Overlap(2, 7, 1)
    assert overlaps([a, b, a])[(0, 2)].jaccard == 1.0
