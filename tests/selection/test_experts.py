"""``low_rank`` takes the matrices of stacked experts one by one."""

from __future__ import annotations

import copy

import torch
from torch import nn

import sparseft

EXPERTS = 3


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, 6, 9))
        self.zero = nn.Linear(9, 6)


class Apart(nn.Module):
    """The same numbers, a parameter for each matrix; names in the same order."""

    def __init__(self, stacked) -> None:
        super().__init__()
        self.stack = nn.ParameterList(nn.Parameter(m.clone()) for m in stacked.stack.detach())
        self.zero = copy.deepcopy(stacked.zero)


def test_stacks_are_scored_matrix_by_matrix():
    torch.manual_seed(0)
    stacked = Stacked()
    found = sparseft.select(stacked, "low_rank", density=0.3, rank=2)
    wanted = sparseft.select(Apart(stacked), "low_rank", density=0.3, rank=2)
    masks = [wanted[f"stack.{e}"].to_mask() for e in range(EXPERTS)]
    assert torch.equal(found["stack"].to_mask(), torch.stack(masks))
    assert torch.equal(found["zero.weight"].to_mask(), wanted["zero.weight"].to_mask())
    assert 0 < found["stack"].nnz < stacked.stack.numel()
