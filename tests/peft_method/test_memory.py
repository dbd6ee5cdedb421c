"""No dense gradient, no copy of the weight in our layers of PEFT; SHiRA's fail the same check."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

from sparseft.ops._layout import TILE  # noqa: E402
from sparseft.peft import SparseFtConfig  # noqa: E402
from sparseft.profiling.allocations import Allocations  # noqa: E402

SIDE = 2048
WEIGHT = SIDE * SIDE * 4
NNZ = 8 * 2 * SIDE  # SHiRA's count with r=8


def peaks(model, inputs):
    """Return the peak of a forward and of a backward; the second round, so that nothing is lazy."""
    for _ in range(2):
        model.zero_grad()
        with Allocations() as forward:
            loss = model(inputs).float().pow(2).sum()
        with Allocations() as backward:
            loss.backward()
    return forward.peak, backward.peak


def linear():
    return nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)), torch.randn(2, SIDE)


def embedding():
    return nn.Sequential(nn.Embedding(SIDE * 4, SIDE // 4)), torch.randint(0, SIDE * 4, (2, 8))


@pytest.mark.parametrize("build", [linear, embedding], ids=lambda f: f.__name__)
def test_a_step_stays_below_a_tile_and_compact_vectors(build):
    model, inputs = build()
    model = peft.get_peft_model(model, SparseFtConfig(target_modules=["0"], nnz=NNZ))
    forward, backward = peaks(model, inputs)
    allowed = TILE * 4 + NNZ * 4 * 8 + (1 << 20)
    assert allowed < WEIGHT / 2, "the bound would not notice a dense gradient"
    assert backward <= allowed, f"{backward:,} bytes in backward"
    assert forward < WEIGHT / 8, f"{forward:,} bytes in forward"


def test_shira_makes_both():
    model, inputs = linear()
    model = peft.get_peft_model(model, peft.ShiraConfig(target_modules=["0"], r=8))
    forward, backward = peaks(model, inputs)
    assert forward >= WEIGHT
    assert backward >= WEIGHT
