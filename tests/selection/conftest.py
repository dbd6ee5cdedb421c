"""Models with every kind of parameter, and their tuned twins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


class Odd(nn.Module):
    """0-d to 3-d, empty, non-contiguous, tied, and not floating."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.scalar = parameter()
        self.vector = parameter(7)
        self.matrix = parameter(5, 6)
        self.cube = parameter(3, 2, 4)
        self.empty = parameter(0, 3)
        self.strided = nn.Parameter(torch.randn(4, 9, generator=generator).to(dtype).t())
        self.embed = nn.Embedding(6, 3).to(dtype)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight
        self.counts = nn.Parameter(torch.arange(5), requires_grad=False)


CANDIDATES = ["cube", "embed.weight", "empty", "matrix", "scalar", "strided", "vector"]


@pytest.fixture
def odd():
    return Odd


@pytest.fixture
def pair():
    """(base, tuned): differences of every size, many of them equal."""

    def make(dtype: torch.dtype = torch.float32, ties: bool = True):
        base = Odd(dtype)
        tuned = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.is_floating_point():
                    step = torch.randn(parameter.shape, generator=generator)
                    if ties:
                        step = step.mul(2).round().mul(0.25)
                    parameter.add_(step.to(dtype))
        return base, tuned

    return make
