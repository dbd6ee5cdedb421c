"""P2, frozen is frozen, and P3, exact undo: bit-equality after hundreds of steps with decay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, SparseSGD, attach
from sparseft.errors import StackOrderError
from sparseft.modules.storage_stack import Holder, bottom_value, holders, pop, push
from sparseft.ops import gather_entries, write_entries_, write_sum_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIMIZERS = {
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9, weight_decay=0.1),
    "sparse_adamw": lambda p: SparseAdamW(p, lr=3e-3, weight_decay=0.3),
    "sparse_sgd": lambda p: SparseSGD(p, lr=3e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def bits(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def check_frozen(model, base, masks):
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert same_bits(now[~mask], base[name][~mask]), f"{name}: frozen entries moved"
        assert not torch.equal(now[mask], base[name][mask]), f"{name}: nothing was trained"


class Small(nn.Module):
    """Embedding tied to its head, a norm and a layer: both tiers, 1-D and 2-D, cheap enough for
    hundreds of steps."""

    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.up = nn.Embedding(23, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.norm(self.up(self.emb(ids)).tanh()))


EVERY = [(kind, torch.float32) for kind in OPTIMIZERS]
LOW = [
    ("adamw_fused", torch.bfloat16),
    ("sparse_adamw", torch.bfloat16),
    ("sgd", torch.float16),
    ("sparse_adamw", torch.float16),
]


@pytest.mark.parametrize(("kind", "dtype"), [*EVERY, *LOW], ids=str)
def test_frozen_entries_and_restore_are_bit_exact(kind, dtype, ids, kit):
    torch.manual_seed(0)
    model = Small().to(dtype)
    base = kit.snapshot(model)
    masks = kit.masks(model)
    sparse = attach(model, masks)
    optimizer = OPTIMIZERS[kind](sparse.parameters())
    for _ in range(200):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
    assert kit.agrees(sparse)
    check_frozen(model, base, masks)
    sparse.detach(restore=True)
    after = kit.snapshot(model)
    assert after.keys() == base.keys()
    assert all(same_bits(after[n], base[n]) for n in base)
    assert all(p.requires_grad for p in model.parameters())


def test_decay_pulls_the_weight_to_its_base(ids, kit):
    model = kit.make()
    base = kit.snapshot(model)
    sparse = attach(model, {"up.weight": kit.masks(model)["up.weight"]})
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=1.0)
    leaf = sparse.leaves["up.weight"]
    with torch.no_grad():
        leaf.normal_()
    for _ in range(200):
        leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
    assert leaf.abs().max() < 1e-8
    assert torch.allclose(model.up.weight, base["up.weight"], atol=1e-8)
    assert base["up.weight"].abs().min() > 0, "the base is not what decay pulls to zero"


def test_density_one_is_dense_fine_tuning_bit_for_bit(ids, kit):
    """With a zero base, base + diff rounds nowhere, and each tier sums in dense order."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    for p in (dense[0].weight, dense[0].bias, dense[3].bias):
        nn.init.zeros_(p)
    # The middle and top weights stay: they are frozen in both runs.
    names = ["0.weight", "0.bias", "3.bias"]
    model = copy.deepcopy(dense)
    sparse = attach(model, {n: torch.ones_like(dense.get_parameter(n)) > 0 for n in names})
    dense.requires_grad_(False)
    for n in names:
        dense.get_parameter(n).requires_grad_(True)
    a = torch.optim.AdamW([dense.get_parameter(n) for n in names], lr=1e-2, foreach=False)
    b = SparseAdamW(sparse.parameters(), lr=1e-2)
    x, y = torch.randn(7, 6), torch.randn(7, 3)
    for step in range(50):
        for net, optimizer in ((dense, a), (model, b)):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        for n in names:
            assert same_bits(dense.get_parameter(n), model.get_parameter(n)), (step, n)


def test_density_one_is_dense_fine_tuning_to_rounding(ids, kit):
    """With any base the sums round differently: no further off than two dense runs in fp32."""
    exact, stock, model = kit.make(torch.float64), kit.make(), kit.make()
    base = kit.snapshot(stock)
    sparse = attach(model, {n: torch.ones_like(p) > 0 for n, p in stock.named_parameters()})
    runs = [
        (net, torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        for net, parameters in (
            (exact, exact.parameters()),
            (stock, stock.parameters()),
            (model, sparse.parameters()),
        )
    ]
    for _ in range(30):
        for net, optimizer in runs:
            optimizer.zero_grad()
            logits = net(ids)[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
            optimizer.step()
    for name, p in stock.named_parameters():
        truth = exact.get_parameter(name) - base[name].double()
        theirs = (p.double() - base[name].double() - truth).norm() / truth.norm()
        mine = (sparse.leaves[name].double().view(p.shape) - truth).norm() / truth.norm()
        assert mine <= 2 * theirs + 64 * torch.finfo(torch.float32).eps, name


def test_restore_false_leaves_a_stock_trained_model(ids, kit):
    model = kit.make()
    names = list(model.state_dict())
    sparse = attach(model, kit.masks(model), full_params=[])
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    kit.loss(model, ids).backward()
    optimizer.step()
    trained = {n: model.get_parameter(n).detach().clone() for n in sparse.names}
    out = model(ids).detach()
    sparse.detach(restore=False)
    assert list(model.state_dict()) == names
    assert type(model.up) is nn.Linear
    assert all(same_bits(model.get_parameter(n), t) for n, t in trained.items())
    assert torch.equal(model(ids), out)
    assert not any(holders(p) for p in model.parameters())
    # And it can be attached again, from there.
    with attach(model, kit.masks(model)) as again:
        assert kit.agrees(again)


def test_full_params_train_densely_and_are_restored(ids, kit):
    model = kit.make()
    base = kit.snapshot(model)
    sparse = attach(
        model, {"up.weight": kit.masks(model)["up.weight"]}, full_params=["norm.*", "head.bias"]
    )
    assert list(dict(sparse.named_parameters())) == [
        "up.diff_weight", "norm.weight", "norm.bias", "head.bias",
    ]  # fmt: skip
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    kit.loss(model, ids).backward()
    assert model.down.weight.grad is None
    optimizer.step()
    assert not torch.equal(model.head.bias, base["head.bias"])
    adapter = sparse.adapter()
    assert set(adapter.dense) == {"norm.weight", "norm.bias", "head.bias"}
    assert torch.equal(adapter.dense["head.bias"], model.head.bias)
    sparse.detach()
    assert all(same_bits(t, base[n]) for n, t in kit.snapshot(model).items())


def test_gradients_left_from_dense_training_move_nothing(ids, kit):
    model = kit.make()
    kit.loss(model, ids).backward()
    base = kit.snapshot(model)
    masks = kit.masks(model)
    sparse = attach(model, masks)
    # An optimizer that holds frozen weights as well as leaves, decay and all.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()
    check_frozen(model, base, masks)
    sparse.detach()
    assert all(same_bits(t, base[n]) for n, t in kit.snapshot(model).items())


def compose_onto(parameter, amount, label="Composer(sw)", parent="ab" * 16):
    """What a Composer does to one parameter: remember, push, write."""
    indices = torch.arange(0, parameter.numel(), 2, dtype=torch.int32)
    saved = gather_entries(parameter.detach(), indices)
    holder = Holder(label, indices, saved, (parent,))
    push(parameter, holder)
    write_sum_(parameter, indices, saved, torch.full(saved.shape, amount))
    return holder


def revert(parameter, holder, name="up.weight"):
    pop(parameter, holder, name=name)
    write_entries_(parameter, holder.indices, holder.saved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attach_above_a_composition(dtype, ids, kit):
    model = kit.make(dtype)
    bottom = kit.snapshot(model)
    weight = model.up.weight
    holder = compose_onto(weight, 0.125)
    composed = weight.detach().clone()
    sparse = attach(model, {"up.weight": kit.masks(model)["up.weight"]})
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()
    # The diff is relative to the composed base, the fingerprint is of the bottom one.
    assert same_bits(bottom_value(weight), bottom["up.weight"])
    adapter = sparse.adapter()
    assert adapter.metadata.parents == ("ab" * 16,)
    assert adapter.metadata.fingerprint.tensors["up.weight"].digest == plain_digest(bottom)
    with pytest.raises(StackOrderError, match=r"up.weight.*attach"):
        revert(weight, holder)
    sparse.detach()
    assert same_bits(weight, composed)
    revert(weight, holder)
    assert same_bits(weight, bottom["up.weight"])


def plain_digest(state):
    from sparseft.fingerprint import fingerprint_tensor

    return fingerprint_tensor("up.weight", state["up.weight"]).digest


def test_what_is_applied_above_blocks_every_write_below(ids, kit):
    model = kit.make()
    base = kit.snapshot(model)
    weight = model.up.weight
    sparse = attach(model, {"up.weight": kit.masks(model)["up.weight"]})
    optimizers = [
        torch.optim.AdamW(sparse.parameters(), lr=1e-2),
        SparseAdamW(sparse.parameters(), lr=1e-2),
    ]
    kit.loss(model, ids).backward()
    holder = compose_onto(weight, 0.5, "Composer(nli)")
    above = weight.detach().clone()
    leaf = sparse.leaves["up.weight"].detach().clone()
    for optimizer in optimizers:
        with pytest.raises(StackOrderError, match=r"Composer\(nli\)"):
            optimizer.step()
    with pytest.raises(StackOrderError, match=r"Composer\(nli\)"):
        sparse.sync_()
    with pytest.raises(StackOrderError, match=r"cannot detach 'up.weight'.*Composer\(nli\)"):
        sparse.detach()
    with pytest.raises(StackOrderError, match=r"Composer\(nli\)"):
        model.load_state_dict(model.state_dict())
    assert same_bits(weight, above)
    assert torch.equal(sparse.leaves["up.weight"], leaf), "the step was refused half-way"
    revert(weight, holder)
    optimizers[0].step()
    sparse.detach()
    assert all(same_bits(t, base[n]) for n, t in kit.snapshot(model).items())


def test_a_kept_diff_above_a_composition_blocks_its_revert(ids, kit):
    model = kit.make()
    weight = model.up.weight
    holder = compose_onto(weight, 0.5)
    attach(model, {"up.weight": kit.masks(model)["up.weight"]}).detach(restore=False)
    with pytest.raises(StackOrderError, match=r"kept by detach\(restore=False\)"):
        revert(weight, holder)


def test_second_attachment_on_other_parameters_is_last_in_first_out(ids, kit):
    model = kit.make()
    base = kit.snapshot(model)
    masks = kit.masks(model)
    first = attach(model, {"up.weight": masks["up.weight"], "up.bias": masks["up.bias"]})
    second = attach(model, {"down.weight": masks["down.weight"]})
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=1e-2)
    kit.loss(model, ids).backward()
    optimizer.step()
    assert kit.agrees(first)
    assert kit.agrees(second)
    with pytest.raises(StackOrderError, match=r"down.weight"):
        first.detach()
    second.detach()
    first.detach()
    assert all(same_bits(t, base[n]) for n, t in kit.snapshot(model).items())
    assert all(p.requires_grad for p in model.parameters())


def test_signed_zeros_and_nan_payloads_come_back():
    model = nn.Linear(4, 2, bias=False)
    payload = torch.tensor([0x7FC01234, -(2**31), 0x00000001, 0x3F800000], dtype=torch.int32)
    with torch.no_grad():
        model.weight[0] = payload.view(torch.float32)
    before = model.weight.detach().clone()
    sparse = attach(model, {"weight": torch.ones(2, 4) > 0})
    with torch.no_grad():
        sparse.leaves["weight"].fill_(1.5)
    sparse.sync_()
    sparse.detach()
    assert same_bits(model.weight, before)
