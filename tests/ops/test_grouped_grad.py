"""`grouped_grad_at` against its definition: rows of each expert, every way to give them."""

from __future__ import annotations

import pytest
import torch

from sparseft.ops import grouped_grad
from sparseft.ops.grouped_grad import grouped_grad_at, grouped_grad_reference

SIZES = [5, 0, 1, 7]  # rows of each expert


def problem(dtype, m=6, n=9):
    torch.manual_seed(0)
    dy, x = torch.randn(13, m).to(dtype), torch.randn(13, n).to(dtype)
    masks = [torch.rand(m * n) < 0.4 for _ in SIZES]
    masks[3][:] = False
    return dy, x, [mask.nonzero().view(-1).int() for mask in masks]


@pytest.mark.parametrize("at_once", [0, 6_000_000], ids=["planned", "at_once"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["slices", "positions"])
def test_the_definition(by, dtype, transposed, at_once, monkeypatch, assert_as_accurate):
    monkeypatch.setattr(grouped_grad, "_AT_ONCE", at_once)
    dy, x, indices = problem(dtype)
    if by == "slices":
        ends = torch.tensor(SIZES).cumsum(0).tolist()
        rows = [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    else:
        rows = list(torch.randperm(13).split(SIZES))
    found = grouped_grad_at(dy, x, rows, indices, transposed)
    wanted = grouped_grad_reference(dy, x, rows, indices, transposed)
    exact = grouped_grad_reference(dy.double(), x.double(), rows, indices, transposed)
    assert found.dtype == wanted.dtype
    assert found.shape == (sum(i.numel() for i in indices),)
    assert_as_accurate(found, wanted, exact)


def test_nothing_to_do():
    dy, x, indices = problem(torch.float32)
    none = [i[:0] for i in indices]
    rows = [slice(0, 0)] * len(SIZES)
    assert grouped_grad_at(dy, x, rows, none).shape == (0,)
    assert not grouped_grad_at(dy, x, rows, indices).any()
