"""Pure bf16 and fp16 weights under fp32 diffs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseft
from sparseft.ops._common import bits


def _beside(name: str, folder: Path):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HERE = Path(__file__).parent
_amp = _beside("_amp", _HERE)
BF16 = _amp.BF16
FP16 = _amp.FP16
OPTIMIZERS = _amp.OPTIMIZERS
MASKED = _amp.MASKED
make = _amp.make
masks_of = _amp.masks_of
loss_of = _amp.loss_of
check_written = _amp.check_written


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_pure_low_precision_weights_are_the_rounded_sum_after_every_step(dtype, kind):
    model, start = make(dtype), make(dtype)
    sparse = sparseft.attach(model, masks_of(model))
    optimizer = OPTIMIZERS[kind](sparse.parameters(), lr=1e-2, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=dtype == FP16)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        assert all(p.grad.dtype == torch.float32 for p in sparse.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert all(leaf.detach().any() for leaf in sparse.leaves.values())
        check_written(sparse, start)
    sparse.detach()
    for (name, a), (_, b) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        assert torch.equal(bits(a.detach()), bits(b.detach())), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_decay_pulls_a_bf16_weight_back_to_its_base(kind):
    model, start = make(BF16), make(BF16)
    sparse = sparseft.attach(model, masks_of(model))
    for leaf in sparse.leaves.values():
        leaf.data.fill_(0.5)
    sparse.sync_()
    optimizer = OPTIMIZERS[kind](sparse.parameters(), lr=0.5, weight_decay=1.0)
    for step in range(1, 21):
        for leaf in sparse.leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
        if step in (1, 10):
            wanted = torch.full_like(leaf, 0.5).double() * 0.5**step
            assert torch.allclose(leaf.detach().double(), wanted, rtol=1e-5, atol=0)
            check_written(sparse, start)
    # 0.5^21 is less than half a unit in the last place of all but the smallest weights.
    for name in MASKED:
        weight, base = model.get_parameter(name).detach(), start.get_parameter(name).detach()
        large = base.abs() > 1e-2
        assert torch.equal(bits(weight[large]), bits(base[large])), name


@pytest.mark.parametrize("kind", ["sparse", "fused"])
def test_small_updates_add_up_where_a_bf16_weight_loses_them(kind):
    """Each step is 1e-4 on a weight of 1, whose neighbours in bf16 are 2^-8 and 2^-7 away."""
    layers = [nn.Linear(4, 3, bias=False, dtype=BF16) for _ in range(2)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    ours, dense = layers
    sparse = sparseft.attach(ours, {"weight": torch.ones(3, 4, dtype=torch.bool)})
    build = OPTIMIZERS[kind]
    stock = OPTIMIZERS["loop" if kind == "sparse" else kind]
    sides = (
        (ours, build(sparse.parameters(), lr=1e-4, weight_decay=0.0)),
        (dense, stock(dense.parameters(), lr=1e-4, weight_decay=0.0)),
    )
    x = torch.ones(2, 4, dtype=BF16)
    for _ in range(40):
        for layer, optimizer in sides:
            optimizer.zero_grad()
            layer(x).sum().backward()
            optimizer.step()
    assert torch.equal(dense.weight.detach(), torch.ones(3, 4, dtype=BF16))  # it stalls
    leaf = sparse.leaves["weight"].detach()
    assert torch.allclose(leaf, torch.full((12,), -4e-3), rtol=1e-4)
    moved = (1 + leaf).to(BF16).view(3, 4)
    assert torch.equal(ours.weight.detach(), moved)
    assert moved[0, 0] == 1 - 2**-8


def test_an_adapter_trained_on_bf16_weights_carries_its_fp32_diff():
    """Into bf16 weights it gives the trained bits; into fp32 ones base + diff, unrounded."""
    model, wide = make(BF16), make()
    sparse = sparseft.attach(model, masks_of(model))
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    adapter = sparse.adapter()
    again = sparseft.attach(make(BF16), adapter)
    for name, weight in model.named_parameters():
        assert torch.equal(bits(again.model.get_parameter(name).detach()), bits(weight.detach())), (
            name
        )
    sparseft.attach(wide, adapter)
    for name, leaf in sparse.leaves.items():
        mask = sparse.patterns[name].to_mask()
        base = make().get_parameter(name).detach()[mask]
        assert torch.equal(wide.get_parameter(name).detach()[mask], base + leaf.detach()), name


def test_pure_fp16_weights_take_a_scaler_that_stock_ones_cannot():
    """torch does not unscale fp16 gradients; those of leaves are fp32."""
    model, stock, start = make(FP16), make(FP16), make(FP16)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(stock, 0)).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    sparse = sparseft.attach(model, masks_of(model))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    check_written(sparse, start)


def test_a_scaler_brings_back_fp16_gradients_that_underflow():
    found = {}
    for scale in (1.0, 2.0**14):
        sparse = sparseft.attach(model := make(FP16), masks_of(model))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, 0) * 1e-8).backward()
        scaler.step(optimizer)
        found[scale] = {name: leaf.detach().clone() for name, leaf in sparse.leaves.items()}
    assert not any(values.any() for values in found[1.0].values())
    assert all(values.any() for values in found[2.0**14].values())
