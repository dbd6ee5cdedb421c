"""Mixed precision: fp16 with GradScaler, bf16 autocast, pure bf16 and fp16 weights, stock loops."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseft
from sparseft.ops._common import bits

_spec = importlib.util.spec_from_file_location(
    "_accuracy", Path(__file__).parent.parent / "_accuracy.py"
)
_accuracy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_accuracy)
assert_as_accurate = _accuracy.assert_as_accurate

BF16, FP16 = torch.bfloat16, torch.float16
OPTIMIZERS = {
    "sparse": lambda p, **o: sparseft.SparseAdamW(p, **o),
    "loop": lambda p, **o: torch.optim.AdamW(p, foreach=False, fused=False, **o),
    "foreach": lambda p, **o: torch.optim.AdamW(p, foreach=True, **o),
    "fused": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
}


class Net(nn.Module):
    """A fused embedding and linears, a convolution of the generic tier, a norm, a full head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.emb(ids))
        h = h + self.down(F.gelu(self.up(h)))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.head(h.mean(1))


MASKED = ("emb.weight", "up.weight", "up.bias", "down.weight", "conv.weight")


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(BF16).to(dtype)  # every dtype holds the same weights


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.4
        for name in MASKED
    }


def batch(step: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 19, (rows, 7), generator=generator)
    return ids, ids[:, 0] % 5


def loss_of(model: nn.Module, step: int, rows: slice = slice(None)) -> Tensor:
    ids, labels = batch(step)
    return F.cross_entropy(model(ids[rows]).float(), labels[rows])


def snapshot(sparse: sparseft.Attachment, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights, leaves and moments."""
    found = dict(sparse.model.named_parameters())
    for number, parameter in enumerate(sparse.parameters()):
        state = optimizer.state.get(parameter, {})
        found |= {f"{number} {key}": value for key, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def check_written(sparse: sparseft.Attachment, start: nn.Module) -> None:
    """Frozen bits are the start's; masked ones are the rounded sum of start and leaf."""
    begun = dict(start.named_parameters())
    for name, leaf in sparse.leaves.items():
        weight, mask = sparse.model.get_parameter(name).detach(), sparse.patterns[name].to_mask()
        base = begun[name].detach()
        assert leaf.dtype == torch.float32
        assert torch.equal(bits(weight[~mask]), bits(base[~mask])), name
        assert torch.equal(weight[mask], (base[mask].float() + leaf.detach()).to(weight.dtype)), (
            name
        )
    trained = {*sparse.leaves, *sparse.full_params}
    for name, base in begun.items():
        if name not in trained:
            now = sparse.model.get_parameter(name).detach()
            assert torch.equal(bits(now), bits(base.detach())), name


def scaled_step(
    sparse: sparseft.Attachment,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    *,
    factor: float = 1.0,
    clip: float | None = None,
) -> None:
    """One step as torch's documentation has it."""
    optimizer.zero_grad()
    with torch.autocast("cpu", FP16):
        loss = loss_of(sparse.model, step) * factor
    scaler.scale(loss).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(sparse.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


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


# Pure bf16 and fp16 weights.


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
