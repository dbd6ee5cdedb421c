"""Autocast: fp16 with a GradScaler, bf16, and low-precision weights under either."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparseft


def _beside(name: str, folder: Path):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HERE = Path(__file__).parent
_amp = _beside("_amp", _HERE)
assert_as_accurate = _beside("_accuracy", _HERE.parent).assert_as_accurate
BF16 = _amp.BF16
FP16 = _amp.FP16
OPTIMIZERS = _amp.OPTIMIZERS
MASKED = _amp.MASKED
make = _amp.make
masks_of = _amp.masks_of
batch = _amp.batch
loss_of = _amp.loss_of
snapshot = _amp.snapshot
same = _amp.same
check_written = _amp.check_written
scaled_step = _amp.scaled_step


# fp16 autocast with a GradScaler.


@pytest.mark.parametrize("clip", [None, 0.5], ids=["scaled", "unscaled and clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_overflow_skips_the_step_whole(kind, clip):
    """Weights, leaves, moments, a full head: no bit moves, and the next step goes on."""
    model, start = make(), make()
    sparse = sparseft.attach(model, masks_of(model), full_params=["head.*"])
    optimizer = OPTIMIZERS[kind](sparse.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(2):
        scaled_step(sparse, optimizer, scaler, step, clip=clip)
    before = snapshot(sparse, optimizer)
    scaler.update(2.0**30)  # beyond what fp16 gradients hold
    scaled_step(sparse, optimizer, scaler, 2, clip=clip)
    assert not all(p.grad.isfinite().all() for p in sparse.leaves.values())
    assert same(snapshot(sparse, optimizer), before)
    assert scaler.get_scale() == 2.0**29
    scaler.update(2.0**8)
    scaled_step(sparse, optimizer, scaler, 3, clip=clip)
    after = snapshot(sparse, optimizer)
    assert all(not torch.equal(after[n], before[n]) for n in (*MASKED, "head.weight"))
    check_written(sparse, start)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_scale_moves_as_in_dense_training(kind):
    bad = {2: float("inf"), 5: float("nan"), 6: float("inf")}
    scales = {}
    for side in ("dense", "ours"):
        model = make()
        if side == "dense":
            parameters = list(model.parameters())
        else:
            sparse = sparseft.attach(model, masks_of(model), full_params=["head.*", "norm.*"])
            parameters = list(sparse.parameters())
        make_optimizer = OPTIMIZERS["loop" if side == "dense" else kind]
        optimizer = make_optimizer(parameters, lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
        seen = []
        for step in range(11):
            optimizer.zero_grad()
            with torch.autocast("cpu", FP16):
                loss = loss_of(model, step) * bad.get(step, 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
        scales[side] = seen
    assert scales["ours"] == scales["dense"]
    assert min(scales["dense"]) < 2.0**6 < max(scales["dense"])


def test_optimizers_agree_under_a_scaler():
    """Overflow and clipping included; ours is AdamW's loop bit for bit, the others are as near."""
    leaves = {}
    for kind, build in OPTIMIZERS.items():
        sparse = sparseft.attach(model := make(), masks_of(model))
        optimizer = build(sparse.parameters(), lr=1e-2, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        # The same gradients for all: a difference in the last bit would grow from step to step.
        for step in range(6):
            for number, leaf in enumerate(sparse.parameters()):
                generator = torch.Generator().manual_seed(10 * step + number)
                leaf.grad = torch.randn(leaf.shape, generator=generator)
                leaf.grad *= scaler.scale(torch.tensor(1.0))
            if step == 2:
                leaf.grad[0] = float("inf")
            if step >= 3:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        check_written(sparse, make())
        leaves[kind] = torch.cat([p.detach() for p in sparse.parameters()])
    assert torch.equal(leaves["sparse"], leaves["loop"])
    exact = stepped_in_fp64(6, skipped=2, clipped=3)
    for kind, values in leaves.items():
        assert_as_accurate(values, leaves["loop"], exact, name=kind)


def stepped_in_fp64(steps: int, *, skipped: int, clipped: int) -> Tensor:
    """AdamW in fp64 on the gradients of the test above, without any scale."""
    sizes = [int(mask.sum()) for mask in masks_of(make()).values()]
    values = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    optimizer = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        for number, value in enumerate(values):
            generator = torch.Generator().manual_seed(10 * step + number)
            value.grad = torch.randn(value.shape, generator=generator).double()
        if step >= clipped:
            nn.utils.clip_grad_norm_(values, 1.0)
        if step != skipped:
            optimizer.step()
    return torch.cat([value.detach() for value in values])


def test_clipping_after_unscale_is_of_the_plain_gradients():
    sparse = sparseft.attach(model := make(), masks_of(model))
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", FP16):
        loss = loss_of(model, 0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(sparse.parameters(), 0.01)
    found = torch.cat([p.grad for p in sparse.parameters()])
    assert norm > 0.1
    assert float(found.norm()) == pytest.approx(0.01, rel=1e-4)
    exact = gradients_at_masks(make(torch.float64))
    exact *= 0.01 / exact.norm()
    dense = make()
    with torch.autocast("cpu", FP16):
        loss = loss_of(dense, 0) * 2.0**10
    loss.backward()
    theirs = picked(dense)
    theirs *= 0.01 / theirs.norm()
    assert_as_accurate(found, theirs, exact, name="clipped")


def picked(model: nn.Module) -> Tensor:
    """Dense gradients at the masks, in the order of the leaves."""
    masks = masks_of(model)
    names = [name for name, _ in model.named_parameters() if name in masks]
    return torch.cat([model.get_parameter(n).grad[masks[n]].double() for n in names])


def gradients_at_masks(model: nn.Module, steps: int = 1) -> Tensor:
    """Of the mean loss over some steps' batches."""
    for step in range(steps):
        (loss_of(model, step) / steps).backward()
    return picked(model)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_accumulated_gradients_are_as_near_as_dense_ones(dtype):
    """Four backwards under autocast into one gradient, which is fp32 on both sides."""
    exact = gradients_at_masks(make(torch.float64), steps=4)
    sides = {}
    for side in ("dense", "ours"):
        model = make()
        sparse = sparseft.attach(model, masks_of(model)) if side == "ours" else None
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == FP16)
        for step in range(4):
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, step) / 4
            scaler.scale(loss).backward()
        found = (
            picked(model) if sparse is None else torch.cat([p.grad for p in sparse.parameters()])
        )
        sides[side] = found / scaler.get_scale()
    assert_as_accurate(sides["ours"].float(), sides["dense"].float(), exact)


def test_accumulation_steps_once_and_an_overflow_in_it_skips_all():
    model, start = make(), make()
    sparse = sparseft.attach(model, masks_of(model))
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for window in range(3):
        before = snapshot(sparse, optimizer)
        for part in range(4):
            with torch.autocast("cpu", FP16):
                loss = loss_of(model, 4 * window + part) / 4
            scaler.scale(loss * (float("inf") if (window, part) == (1, 2) else 1.0)).backward()
            assert same(snapshot(sparse, optimizer), before)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same(snapshot(sparse, optimizer), before) == (window == 1)
        check_written(sparse, start)


def test_a_gradient_may_be_larger_than_fp16_holds():
    """The sum over tokens is fp32 at the mask; the dense gradient is fp16 and overflows."""
    layer, x = nn.Linear(4, 3, bias=False), torch.full((8, 4), 300.0)
    stock = copy.deepcopy(layer)
    sparse = sparseft.attach(layer, {"weight": torch.ones(3, 4, dtype=torch.bool)})
    for module in (layer, stock):
        with torch.autocast("cpu", FP16):
            (module(x).float().sum() * 300).backward()
    assert not stock.weight.grad.isfinite().any()
    assert torch.equal(sparse.leaves["weight"].grad, torch.full((12,), 8 * 300.0 * 300.0))


# bf16 autocast.


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bf16_autocast_trains_fp32_weights(kind):
    model, start = make(), make()
    sparse = sparseft.attach(model, masks_of(model), full_params=["head.*"])
    optimizer = OPTIMIZERS[kind](sparse.parameters(), lr=1e-2)
    seen = []
    model.up.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = loss_of(model, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert set(seen) == {BF16}
    assert losses[-1] < losses[0]
    assert all(p.grad.dtype == torch.float32 for p in sparse.parameters())
    check_written(sparse, start)


@pytest.mark.parametrize("restore", [True, False])
def test_detach_leaves_no_stale_cast(restore):
    """Within a block autocast keeps casts of weights that require grad, changed since or not."""
    model = make()
    ids, _ = batch(0)
    with torch.autocast("cpu", BF16):
        base = model(ids)  # the weights' casts are kept from here on
        sparse = sparseft.attach(model, masks_of(model))
        optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=0.1)
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
        trained = model(ids)
        assert not torch.equal(trained, base)
        sparse.detach(restore=restore)
        assert torch.equal(model(ids), base if restore else trained)


# Mixtures.


@pytest.mark.parametrize("cast", [BF16, FP16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_low_precision_weights_under_autocast(dtype, cast):
    """Also where the two differ: gradients no further from fp64 than the dense ones."""
    exact = gradients_at_masks(make(torch.float64))
    sides = {}
    for side in ("dense", "ours"):
        model = make(dtype)
        sparse = sparseft.attach(model, masks_of(model)) if side == "ours" else None
        with torch.autocast("cpu", cast):
            loss = loss_of(model, 0) * 2.0**8
        loss.backward()
        found = (
            picked(model) if sparse is None else torch.cat([p.grad for p in sparse.parameters()])
        )
        sides[side] = found.float() / 2.0**8
    assert_as_accurate(sides["ours"], sides["dense"], exact)


def test_backward_inside_the_autocast_block_sums_in_fp32_as_well():
    found = {}
    for inside in (False, True):
        sparse = sparseft.attach(model := make(), masks_of(model))
        with torch.autocast("cpu", BF16):
            loss = loss_of(model, 0)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found[inside] = sparse.leaves["up.weight"].grad
    assert torch.equal(found[True], found[False])
    assert not torch.equal(found[True], found[True].to(BF16).float())
