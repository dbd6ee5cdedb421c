"""P1 at allocator level: no dense weight gradient, no weight copy between forward and backward.

The profiler sees every allocation, also those inside custom ops. Layers are far larger than their
activations, and a deliberately dense implementation fails the same checks.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.ops._layout import TILE
from sparseft.profiling.allocations import Allocations as Memory

SIDE = 4096
WEIGHT = SIDE * SIDE * 4
# One tile buffer, and a few compact vectors and activations (batch 2: 32 KiB each).
TILE_BYTES = TILE * 4


def few(rows, columns, nnz):
    """Return a mask of ``nnz`` entries spread evenly."""
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[:: rows * columns // nnz][:nnz] = True
    return mask.view(rows, columns)


def linear():
    return nn.Linear(SIDE, SIDE, bias=False), torch.randn(2, SIDE)


def embedding():
    return nn.Embedding(SIDE * 4, SIDE // 4), torch.randint(0, SIDE * 4, (2, 8))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(SIDE, SIDE), torch.randn(2, SIDE)


def run(model, inputs, autocast=False):
    """Return memory of a forward and a backward; the second round, so that nothing is lazy."""
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Memory() as forward:
            loss = model(inputs).float().pow(2).sum()
        with Memory() as backward:
            loss.backward()
    return forward, backward


NNZ = 40_000


def allowed(inputs):
    # The tile; per entry row, column, gradient, its accumulation, scratch of the dot products.
    return TILE_BYTES + NNZ * 4 * 8 + 64 * inputs.numel() * 8 + (1 << 20)


@pytest.mark.parametrize("build", [linear, embedding, conv1d], ids=lambda f: f.__name__)
def test_backward_stays_below_a_tile_and_compact_vectors(build):
    model, inputs = build()
    weight = model.weight
    attach(model, {"weight": few(*weight.shape, NNZ)}, full_params=[])
    forward, backward = run(model, inputs)
    assert backward.peak <= allowed(inputs), f"{backward.peak:,} bytes in backward"
    assert allowed(inputs) < WEIGHT / 4, "the bound would not notice a dense gradient"
    assert forward.peak < WEIGHT / 16, f"{forward.peak:,} bytes in forward"
    assert backward.kept <= NNZ * 4 + (1 << 16)


class _DenseThenGather(torch.autograd.Function):
    """What must not pass: dW formed inside the op, where no dispatch-mode observer looks."""

    @staticmethod
    def forward(ctx, x, weight, leaf, indices):
        ctx.save_for_backward(x, weight, indices)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight, indices = ctx.saved_tensors
        return grad @ weight, None, (grad.t() @ x).view(-1)[indices.long()], None


def test_a_dense_implementation_fails_the_same_check(monkeypatch):
    from sparseft.modules import fused

    monkeypatch.setattr(
        fused,
        "linear_at_mask",
        lambda x, weight, bias, masked: _DenseThenGather.apply(
            x, weight, masked.leaf, masked.indices
        ),
    )
    model, inputs = linear()
    attach(model, {"weight": few(SIDE, SIDE, NNZ)})
    _, backward = run(model, inputs)
    assert backward.peak > allowed(inputs)
    assert backward.peak >= WEIGHT


def test_the_generic_tier_frees_its_one_dense_gradient():
    """One layer's gradient at a time, gone at the end: the bound is one weight, not two."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv1d(512, 512, 3, padding=1, bias=False) for _ in range(4)))
    one = 512 * 512 * 3 * 4
    attach(model, {f"{i}.weight": few(512, 512 * 3, 4000).view(512, 512, 3) for i in range(4)})
    inputs = torch.randn(1, 512, 4)
    _, backward = run(model, inputs)
    assert backward.kept < one / 8
    assert backward.peak < 3.5 * one, "gradients of several layers were alive at once"


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_no_weight_copy_is_kept_for_backward(autocast):
    model, inputs = linear()
    attach(model, {"weight": few(SIDE, SIDE, NNZ)})
    inputs.requires_grad_()  # so that the weight is needed in backward
    forward, _ = run(model, inputs, autocast)
    assert forward.kept < WEIGHT / 64, f"{forward.kept:,} bytes alive between passes"


def test_stock_autocast_does_keep_a_copy():
    """The yardstick of the test above: the stock layer keeps its bf16 weight until backward."""
    model, inputs = linear()
    model.weight.requires_grad_(False)
    inputs.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), Memory() as forward:
        loss = model(inputs).float().pow(2).sum()
    assert forward.kept >= WEIGHT / 2
    loss.backward()


def test_attached_state_is_index_base_diff(kit):
    """Per entry: index 4, base 4, diff 4 bytes; the weight itself is not copied."""
    model, _ = linear()
    mask = few(SIDE, SIDE, NNZ)
    before = model.weight.data_ptr()
    with Memory() as memory:
        sparse = attach(model, {"weight": mask})
    assert model._parameters["weight"].data_ptr() == before
    assert memory.kept <= NNZ * 12 + 4096
    with Memory() as memory:
        clone = copy.deepcopy(sparse.leaves["weight"])
    assert memory.kept <= NNZ * 4 + 4096
    del clone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_and_write_back_on_the_gpu(dtype, kit, ids):
    """On a GPU the same numbers come out; P1 there belongs to the Triton kernel of this op."""
    model = kit.make(dtype)
    masks = kit.masks(model)
    sparse = attach(model, masks)
    kit.loss(model, ids).backward()
    cpu = {n: leaf.grad.clone() for n, leaf in sparse.leaves.items()}
    for leaf in sparse.leaves.values():
        leaf.grad = None
    model.cuda()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2, fused=True)
    kit.loss(model, ids.cuda()).backward()
    for name, leaf in sparse.leaves.items():
        error = (leaf.grad.cpu() - cpu[name]).norm() / cpu[name].norm()
        assert error < 32 * torch.finfo(dtype).eps, name
    optimizer.step()
    assert kit.agrees(sparse)
