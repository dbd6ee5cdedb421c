"""Every tier of a masked layer on a base that ``fully_shard`` has cut, layer by layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseft


def beside(name):
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside("_fsdp")
WIDTH = 8


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x):
        inner = [torch.tanh(nn.functional.linear(x, self.up[e])) for e in range(3)]
        return x + sum(part @ self.down[e] for e, part in enumerate(inner))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return x + self.heads(x, x, x, need_weights=False)[0]


class Transposed(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv = Conv1D(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.conv(x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.relu(self.linear(x))


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def trained(model, rank, world, **options):
    """Train three steps with masks on everything; return the weights, masks off again."""
    generator = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(tuple(p.shape), generator=generator) < 0.3
        for name, p in model.named_parameters()
    }
    sparse = sparseft.attach(model, masks, **options)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    for step in range(3):
        x = torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = kit.whole(model)
    sparse.detach()
    return weights


def each_kind(rank, world):
    for kind in (Experts, Recurrent, Attention, Transposed, InPlace):
        wanted = trained(Stack(kind).double(), 0, 1, group=False)
        for reshard in (None, False, 2) if world == 4 else (None, False):
            model = kit.shard(Stack(kind).double(), reshard_after_forward=reshard)
            before = kit.whole(model)
            got = trained(model, rank, world)
            for name, value in wanted.items():
                torch.testing.assert_close(got[name], value, msg=f"{kind.__name__} {name}")
            after = kit.whole(model)
            assert all(torch.equal(after[name], value) for name, value in before.items())
            model(torch.randn(2, 5, WIDTH).double()).sum().backward()  # stock again
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_tier_trains_as_in_one_process(run_ranks, world):
    run_ranks(each_kind, world, world)
