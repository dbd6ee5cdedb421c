"""Every optimizer's step reaches the weight: for-loop, foreach, fused, eager and compiled."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from sparseft import SparseAdamW, SparseSGD, attach
from sparseft.errors import AttachError
from sparseft.modules import leaves, writeback
from sparseft.modules.weak_table import WeakTable

OPTIMIZERS = {
    "for_loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "sparse_adamw": lambda p: SparseAdamW(p, lr=1e-2),
    "sparse_sgd": lambda p: SparseSGD(p, lr=1e-1, momentum=0.9),
}


def train(model, call, optimizer, ids, kit, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        kit.loss(call, ids).backward()
        optimizer.step()


def check_written(sparse, before, kit):
    assert kit.agrees(sparse)
    for name, masked in sparse._masked.items():
        assert not torch.equal(masked.weight, before[name]), f"{name} was not written"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_eager(kind, tiny, ids, kit):
    before = kit.snapshot(tiny)
    sparse = attach(tiny, kit.masks(tiny))
    train(tiny, tiny, OPTIMIZERS[kind](sparse.parameters()), ids, kit)
    check_written(sparse, before, kit)


@pytest.mark.parametrize("kind", ["for_loop", "foreach", "fused", "sparse_adamw"])
def test_compiled_model_trains_as_the_eager_one(kind, ids, kit):
    """No graph break, the same bits: aot_eager runs the traced forward and backward unfused."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = kit.make()
        before = kit.snapshot(model)
        sparse = attach(model, kit.masks(model))
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(model, call, OPTIMIZERS[kind](sparse.parameters()), ids, kit)
        check_written(sparse, before, kit)
        results.append({n: leaf.detach().clone() for n, leaf in sparse.leaves.items()})
    eager, traced = results
    assert all(torch.equal(eager[n], traced[n]) for n in eager)


@pytest.mark.slow
def test_compiled_by_inductor(ids, kit):
    torch._dynamo.reset()
    model = kit.make()
    before = kit.snapshot(model)
    sparse = attach(model, kit.masks(model))
    train(model, torch.compile(model), OPTIMIZERS["fused"](sparse.parameters()), ids, kit)
    check_written(sparse, before, kit)


def test_closure_optimizer(tiny, ids, kit):
    before = kit.snapshot(tiny)
    sparse = attach(tiny, kit.masks(tiny))
    optimizer = torch.optim.LBFGS(sparse.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(tiny, ids)
        loss.backward()
        return loss

    optimizer.step(closure)
    check_written(sparse, before, kit)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_evaluated_on_the_weights_of_the_moved_leaves(by_keyword):
    torch.manual_seed(0)
    x, base = torch.randn(6, 4), nn.Linear(4, 3, bias=False)
    every = torch.ones(3, 4, dtype=torch.bool)
    losses = {}
    for kind in ("dense", "masked"):
        model = copy.deepcopy(base)
        parameters = list(model.parameters())
        if kind == "masked":
            parameters = list(attach(model, {"weight": every}).parameters())
        optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)
        seen = []

        def closure(model=model, optimizer=optimizer, seen=seen):
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            seen.append(loss.item())
            return loss

        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        losses[kind] = seen
    assert losses["masked"] == pytest.approx(losses["dense"], rel=1e-4)
    assert losses["masked"][-1] < losses["masked"][0]


def test_scheduler_clipping_and_scaler(tiny, ids, kit):
    before = kit.snapshot(tiny)
    sparse = attach(tiny, kit.masks(tiny))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = kit.loss(tiny, ids)
        scaler.scale(loss).backward()
        if step == 1:  # overflow: the scaler skips this step, and nothing moves
            sparse.leaves["up.weight"].grad[0] = float("inf")
            at_overflow = kit.snapshot(tiny)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(sparse.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert not norm.isfinite()
            assert all(torch.equal(t, at_overflow[n]) for n, t in kit.snapshot(tiny).items())
        scheduler.step()
    check_written(sparse, before, kit)


def test_two_optimizers_write_only_their_own_leaves(tiny, ids, kit):
    sparse = attach(tiny, kit.masks(tiny))
    leaves = sparse.leaves
    first = torch.optim.SGD([leaves["up.weight"]], lr=0.1)
    kit.loss(tiny, ids).backward()
    before = kit.snapshot(tiny)
    with torch.no_grad():
        leaves["down.weight"].add_(1.0)  # not this optimizer's: stays unwritten until sync_
    first.step()
    assert not torch.equal(tiny.up._parameters["weight"], before["up.weight"])
    assert torch.equal(tiny.down._parameters["weight"], before["down.weight"])
    sparse.sync_()
    assert kit.agrees(sparse)


def test_optimizer_built_before_attach_stops_at_its_first_step(tiny, ids, kit):
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2, fused=True)
    base = kit.snapshot(tiny)
    attach(tiny, kit.masks(tiny))
    kit.loss(tiny, ids).backward()
    with pytest.raises(AttachError, match=r"built before attach.*optimizer=optimizer"):
        optimizer.step()
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(tiny).items() if n in base)


def test_optimizer_argument_rewrites_the_groups(tiny, ids, kit):
    decay = [p for p in tiny.parameters() if p.ndim > 1]
    rest = [p for p in tiny.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.5}, {"params": rest, "lr": 5e-2, "weight_decay": 0.0}],
        lr=1e-2,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    kit.loss(tiny, ids).backward()
    optimizer.step()  # dense training first, so that there is state to drop
    before = kit.snapshot(tiny)
    masks = kit.masks(tiny)
    masks = {n: masks[n] for n in ("emb.weight", "up.weight", "up.bias", "down.weight")}
    sparse = attach(tiny, masks, full_params=["norm.*"], optimizer=optimizer)
    leaves = sparse.leaves
    first, second = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in first} == {
        id(leaves[n]) for n in ("emb.weight", "up.weight", "down.weight")
    }
    assert {id(p) for p in second} == {id(leaves["up.bias"]), *map(id, tiny.norm.parameters())}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert set(map(id, optimizer.state)) == set(map(id, tiny.norm.parameters()))
    train(tiny, tiny, optimizer, ids, kit)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 2.5e-2]
    check_written(sparse, before, kit)


def test_optimizer_argument_adds_leaves_it_did_not_know(tiny, kit):
    optimizer = torch.optim.SGD([tiny.norm.weight], lr=1e-2)
    sparse = attach(tiny, {"up.weight": kit.masks(tiny)["up.weight"]}, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in sparse.parameters()]


def test_a_tensor_without_gradient_is_named_once(tiny, ids, kit, caplog):
    class Detour(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.unused = nn.Linear(3, 3)

        def forward(self, ids):
            return self.inner(ids)

    model = Detour(tiny)
    sparse = attach(model, kit.masks(model))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        train(model, model, optimizer, ids, kit)
    (record,) = [r for r in caplog.records if r.name == "sparseft.modules.writeback"]
    assert "unused.weight, unused.bias" in record.getMessage()
    assert f"2 of {len(sparse.names)}" in record.getMessage()


def test_of_many_tensors_without_gradient_five_are_named(caplog):
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(8))
    sparse = attach(model, {n: torch.eye(2) > 0 for n, _ in model.named_parameters()})
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-2)
    model[0](torch.ones(1, 2)).sum().backward()
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        optimizer.step()
    assert "1.weight, 2.weight, 3.weight, 4.weight, 5.weight and 2 more" in caplog.text


def test_hooks_are_there_only_while_masks_are(tiny, kit, monkeypatch):
    # Tables of its own: models of other tests may be alive still, and have hooks.
    for table in ("_by_leaf", "_by_weight"):
        monkeypatch.setattr(leaves, table, WeakTable())
    monkeypatch.setattr(writeback, "_handles", [])

    def installed():
        return [
            hook
            for table in (
                torch_optimizer._global_optimizer_pre_hooks,
                torch_optimizer._global_optimizer_post_hooks,
            )
            for hook in table.values()
            if hook.__module__ == "sparseft.modules.writeback"
        ]

    before = len(installed())
    masks = kit.masks(tiny)
    first = attach(tiny, {"up.weight": masks["up.weight"]})
    second = attach(tiny, {"down.weight": masks["down.weight"]})
    assert len(installed()) == before + 2
    second.detach()
    assert len(installed()) == before + 2
    first.detach()
    assert len(installed()) == before


def test_a_dropped_model_is_freed(kit, ids):
    import gc
    import weakref

    model = kit.make()
    sparse = attach(model, kit.masks(model))
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    kit.loss(model, ids).backward()
    optimizer.step()
    weight = weakref.ref(model.up._parameters["weight"])
    del model, sparse, optimizer
    gc.collect()
    assert weight() is None
